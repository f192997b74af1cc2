"""A ranking drawn: one HTML page that needs nothing else, with plotly's script in it.

Three figures: where each replayed plan's time goes, how full the host buffer is under the best plan, and the rate of
every plan considered. plotly is imported where the page is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seesaw.report.causes import CAUSES, PHASES, Job, time_text
from seesaw.report.ranking import answer, bound_text, job_of, kind
from seesaw.report.text import describe_node, rate

if TYPE_CHECKING:
    from seesaw.planning.candidates import Candidate, Ranking

Figure = dict[str, Any]
"""A figure as plotly takes it: `data` and `layout`."""

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
_INK, _FAINT, _GRID = "#22303c", "#566370", "#e6e9ed"


def page(ranking: Ranking, *, profile: Path | None, notes: Sequence[str]) -> str:
    """The page as HTML."""
    from plotly.offline import get_plotlyjs

    figures = [
        ("Where the time goes", _TIME_CAPTION, time_figure(ranking)),
        ("Host buffer", _BUFFER_CAPTION, buffer_figure(ranking)),
        ("Every plan considered", _RATE_CAPTION, rate_figure(ranking)),
    ]
    sections, scripts = [], []
    for number, (title, caption, figure) in enumerate(figures):
        if figure is None:
            continue
        name = f"figure{number}"
        sections.append(f'<h2>{title}</h2>\n<p>{caption}</p>\n<div id="{name}" class="figure"></div>')
        scripts.append(f"Plotly.newPlot({name!r}, {_script(figure | {'config': _CONFIG})});")
    about = {
        "model": ranking.model.describe(),
        "node": describe_node(ranking.hardware, profile),
        "workload": ranking.workload.describe(),
        "bound": bound_text(ranking),
    }
    rows = list(about.items()) + [("note", note) for note in (*ranking.notes, *notes)]
    return _PAGE.format(
        title=escape(f"{ranking.model.name} on {ranking.hardware.ranks} × {ranking.hardware.name}"),
        answer=escape(answer(ranking)),
        about="\n".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in rows),
        sections="\n".join(sections),
        plotly=get_plotlyjs(),
        scripts="\n".join(scripts),
    )


def _script(value: object) -> str:
    """As JSON that cannot end a script element."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


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
    layout = _layout("seconds of the job", "", height=90 + 26 * row, barmode="overlay")
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
        "font": {"size": 13, "color": _INK},
    }


# ---- the buffer, the rates --------------------------------------------------------------------------------


def buffer_figure(ranking: Ranking) -> Figure | None:
    """Fill of the host buffer over the replay of the best plan; None where it stays empty."""
    job = job_of(ranking.best)
    points = list(job.replay.buffer)
    if not any(fill for _, fill in points):
        return None
    layout = _layout("seconds of the replay", "of the host buffer in use", height=300)
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
    layout = _layout("place", "tokens/s", height=380)
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
            "arrowcolor": _INK,
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


def _layout(x: str, y: str, **more: Any) -> Figure:
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": _GRID, "automargin": True}
    return {
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 13,
            "color": _INK,
        },
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 90, "r": 20, "t": 10, "b": 50},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": _GRID, "font": {"color": _INK}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        "xaxis": {**axis, "title": _axis_title(x)},
        "yaxis": {**axis, "title": _axis_title(y)},
        **more,
    }


def _axis_title(text: str) -> Figure:
    return {"text": text, "font": {"size": 13, "color": _FAINT}}


_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
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
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22303c; margin: 0;
  background: #f5f6f8; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 28px 36px 48px; background: #fff; }}
h1 {{ font-size: 24px; margin: 0 0 6px; }}
h2 {{ font-size: 18px; margin: 34px 0 2px; }}
p {{ margin: 2px 0 8px; color: #566370; }}
p.answer {{ font-size: 17px; color: inherit; font-weight: 600; margin: 0 0 14px; }}
dl {{ display: grid; grid-template-columns: 84px 1fr; gap: 2px 12px; margin: 0; font-size: 14px; }}
dt {{ color: #566370; }}
dd {{ margin: 0; }}
.figure {{ width: 100%; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="answer">{answer}</p>
<dl>
{about}
</dl>
{sections}
</main>
<script>{plotly}</script>
<script>
{scripts}
</script>
</body>
</html>
"""
