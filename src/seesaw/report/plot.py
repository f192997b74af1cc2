"""A ranking drawn: one HTML page that needs nothing else, with plotly's script in it.

Three figures: where each replayed plan's time goes, how full the host buffer is under the best plan, and the rate of
every plan considered. plotly is imported where the page is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.report.causes import CAUSES, PHASES, Job, time_text
from seesaw.report.html import INK, Figure, definitions, document, figure_place, plain_layout, section
from seesaw.report.ranking import answer, bound_text, job_of, kind
from seesaw.report.text import describe_node, rate

if TYPE_CHECKING:
    from seesaw.planning.candidates import Candidate, Ranking

MOST_PLANS = 10
"""Of the first figure."""
_COLOURS = {
    "weights": "#2f6690",
    "arithmetic": "#3a9188",
    "attention": "#81a4cd",
    "activations": "#b7cbe2",
    "all_reduce": "#d1495b",
    "hand_over": "#ed9b6d",
    "overhead": "#b08968",
    "swap": "#9d6ba6",
    "transition": "#d9a5c7",
    "bubble": "#a3a9b2",
    "idle": "#d8dbe0",
}
"""Blue and green: the devices work. Red and orange: they talk. Purple: KV or weights move. Grey: they wait."""
_KINDS = {"re-shards": "#d1495b", "two phases": "#9d6ba6", "static": "#2f6690", "best static": "#2f6690"}


def page(ranking: Ranking, *, profile: Path | None, notes: Sequence[str]) -> str:
    """The page as HTML."""
    figures = [
        ("Where the time goes", _TIME_CAPTION, time_figure(ranking)),
        ("Host buffer", _BUFFER_CAPTION, buffer_figure(ranking)),
        ("Every plan considered", _RATE_CAPTION, rate_figure(ranking)),
    ]
    about = {
        "model": ranking.model.describe(),
        "node": describe_node(ranking.hardware, profile),
        "workload": ranking.workload.describe(),
        "bound": bound_text(ranking),
    }
    rows = list(about.items()) + [("note", note) for note in (*ranking.notes, *notes)]
    body = [definitions(rows)]
    body += [
        section(title, caption, figure_place(f"figure{number}"))
        for number, (title, caption, figure) in enumerate(figures)
        if figure is not None
    ]
    return document(
        title=f"{ranking.model.name} on {ranking.hardware.ranks} × {ranking.hardware.name}",
        answer=answer(ranking),
        body=body,
        figures={f"figure{i}": figure for i, (_, _, figure) in enumerate(figures) if figure is not None},
    )


# ---- where the time goes ----------------------------------------------------------------------------------


def time_figure(ranking: Ranking) -> Figure:
    """A row for each phase of each plan, beginning where the phase before it ended, stacked by cause."""
    shown = list(ranking.replayed[:MOST_PLANS])
    static = ranking.best_static
    if static is not None and all(one is not static for one in shown):
        shown[-1] = static
    jobs = [job_of(candidate) for candidate in shown]
    bars: dict[str, Figure] = {cause: _bars(cause) for cause in CAUSES}
    labels: list[tuple[int, str]] = []
    heads: list[tuple[int, str]] = []
    row = 0
    for candidate, job in zip(shown, jobs, strict=True):
        heads.append((row, _head(ranking, candidate, job)))
        row += 1
        begin = 0.0
        for phase, report in job.replay.phases.items():
            if not report.seconds:
                continue
            labels.append((row, PHASES[phase]))
            begin = _add_row(bars, row, begin, job, phase)
            row += 1
    longest = max(job.seconds for job in jobs)
    layout = plain_layout("seconds of the job", "", height=90 + 26 * row, barmode="overlay")
    layout["xaxis"] |= {"range": [0, longest * 1.02]}
    layout["yaxis"] |= {
        "range": [row - 0.4, -0.6],
        "tickvals": [place for place, _ in labels],
        "ticktext": [text for _, text in labels],
        "showgrid": False,
    }
    layout["annotations"] = [_annotation(place, text) for place, text in heads]
    return {"data": [trace for trace in bars.values() if any(trace["x"])], "layout": layout}


def _bars(cause: str) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": CAUSES[cause].name,
        "marker": {"color": _COLOURS[cause]},
        "x": [],
        "y": [],
        "base": [],
        "width": 0.78,
        "customdata": [],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _add_row(bars: dict[str, Figure], row: int, begin: float, job: Job, phase: str) -> float:
    """A phase of a job, cause after cause; returns where it ends."""
    for cause, seconds in job.replay.phases[phase].causes.items():
        if not seconds:
            continue
        trace, length = bars[cause], seconds * job.scale
        trace["x"].append(length)
        trace["y"].append(row)
        trace["base"].append(begin)
        trace["customdata"].append(
            f"<b>{escape(job.name)}</b>, {PHASES[phase]}<br>{CAUSES[cause].name}: {time_text(length)}, "
            f"{job.share(seconds):.1%} of the job<br>{CAUSES[cause].meaning}"
        )
        begin += length
    return begin


def _head(ranking: Ranking, candidate: Candidate, job: Job) -> str:
    mark = " (best static plan)" if candidate is ranking.best_static else ""
    return f"<b>{escape(job.name)}</b>{mark}: {rate(candidate.rate)} tokens/s, {time_text(job.seconds)}"


def _annotation(row: int, text: str) -> Figure:
    return {
        "x": 0,
        "y": row,
        "text": text,
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "middle",
        "yshift": -3,
        "font": {"size": 13, "color": INK},
    }


# ---- the buffer, the rates --------------------------------------------------------------------------------


def buffer_figure(ranking: Ranking) -> Figure | None:
    """Fill of the host buffer over the replay of the best plan; None where it stays empty."""
    job = job_of(ranking.best)
    points = list(job.replay.buffer)
    if not any(fill for _, fill in points):
        return None
    layout = plain_layout("seconds of the replay", "of the host buffer in use", height=300)
    layout["xaxis"] |= {"range": [0, job.replay.seconds]}
    layout["yaxis"] |= {"tickformat": ".0%", "range": [0, 1.02]}
    area = {
        "type": "scatter",
        "mode": "lines",
        "name": job.name,
        "x": [seconds for seconds, _ in points],
        "y": [fill for _, fill in points],
        "line": {"color": "#9d6ba6", "width": 2},
        "fill": "tozeroy",
        "fillcolor": "rgba(157, 107, 166, 0.18)",
        "hovertemplate": "%{x:,.1f} s: %{y:.0%}<extra></extra>",
    }
    return {"data": [area], "layout": layout}


def rate_figure(ranking: Ranking) -> Figure:
    """Tokens per second of all candidates, from the fastest to the slowest."""
    everyone = sorted((*ranking.replayed, *ranking.others), key=lambda one: -one.rate)
    traces: dict[tuple[str, bool], Figure] = {}
    for place, candidate in enumerate(everyone, start=1):
        group = kind(ranking, candidate).removeprefix("best "), candidate.simulated is not None
        trace = traces.setdefault(group, _dots(*group))
        trace["x"].append(place)
        trace["y"].append(candidate.rate)
        trace["text"].append(_dot_text(candidate))
    layout = plain_layout("place", "tokens/s", height=380)
    layout["xaxis"] |= {"range": [0.4, len(everyone) + 0.6], "tick0": 1, "dtick": -(-len(everyone) // 20)}
    layout["yaxis"] |= {"rangemode": "tozero", "tickformat": ",.0f"}
    static = ranking.best_static
    places = {id(one): place for place, one in enumerate(everyone, start=1)}
    named = [ranking.best, *([static] if static is not None and static is not ranking.best else [])]
    layout["annotations"] = [
        {
            "x": places[id(one)],
            "y": one.rate,
            "text": f"<b>{escape(one.name)}</b>" + (" (best static)" if one is static else ""),
            "xanchor": "left",
            "ax": 26,
            "ay": -22,
            "arrowcolor": INK,
            "arrowwidth": 1,
            "arrowhead": 0,
        }
        for one in named
    ]
    return {"data": list(traces.values()), "layout": layout}


def _dots(group: str, replayed: bool) -> Figure:
    colour = _KINDS[group]
    fill = colour if replayed else "#ffffff"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{group}, {'replayed' if replayed else 'estimated'}",
        "x": [],
        "y": [],
        "text": [],
        "marker": {"color": fill, "size": 9 if replayed else 7, "line": {"color": colour, "width": 1.5}},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _dot_text(candidate: Candidate) -> str:
    how = "estimated" if candidate.simulated is None else "replayed"
    return f"<b>{escape(candidate.name)}</b><br>{rate(candidate.rate)} tokens/s, {how}"


_TIME_CAPTION = (
    "Seconds of the replayed plans by phase and cause, averaged over all pipeline stages. A phase's row begins where "
    "the one before it ended, so a plan's last row ends where its job does; phases alternate in truth. Click a cause "
    "to hide it."
)
_BUFFER_CAPTION = (
    "How much of the host buffer holds the KV of prefilled prompts under the best plan. Prefill fills it, decoding "
    "empties it; each change of direction is a transition."
)
_RATE_CAPTION = (
    "Prompt and output tokens per second. Full dots were replayed request by request by the twin, open ones "
    "estimated in closed form."
)
