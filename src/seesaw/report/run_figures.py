"""The figures of a run's page, as plotly takes them. A figure that has nothing to show is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log10
from typing import TYPE_CHECKING

from seesaw.core.units import format_bytes
from seesaw.recording.bounded import bucket_width
from seesaw.report.causes import time_text
from seesaw.report.html import FAINT, INK, Figure, axis, plain_layout
from seesaw.report.run_view import PARTS, RUNNING, JobView

if TYPE_CHECKING:
    from seesaw.core.hardware import HardwareSpec
    from seesaw.recording.efficiency import PhaseUse

COLOURS = {
    "prefill": "#3a9188",
    "decode": "#2f6690",
    "mixed": "#81a4cd",
    "transition": "#d1495b",
    "idle": "#d8dbe0",
}
_PARTS = {"ranks": "#2f6690", "sampling": "#81a4cd", "control": "#ed9b6d", "files": "#b08968"}
_BUFFER, _POOL = "#9d6ba6", "#566370"
_PROMPT, _OUTPUT = "#3a9188", "#2f6690"
_BINS = 160
"""Points of a rate over time."""
_ALIKE = 8
"""Lengths are alike if the longest is at most so many times the median."""
_NAMED = 14
"""Most bars that have their figure on them."""
NAMES = {"mixed": "both at once"}
"""Of phases, where they are not their own."""


class TimeAxis:
    """Seconds, minutes or hours, as the job's length asks for."""

    def __init__(self, seconds: float) -> None:
        self._unit, self.name = (
            (1.0, "seconds")
            if seconds < 300
            else (60.0, "minutes")
            if seconds < 3 * 3600
            else (3600.0, "hours")
        )
        self.end = seconds / self._unit

    def __call__(self, seconds: float) -> float:
        """In the axis's unit."""
        return round(seconds / self._unit, 6)

    def layout(self, title: str, **more: object) -> Figure:
        """The axis of a figure over the whole job."""
        return axis(f"{self.name} {title}".strip(), range=[0, self.end], **more)


def timeline_figure(view: JobView) -> Figure | None:
    """A strip of phases, and below it how full host buffer and device pools are."""
    if not view.phases or not view.stats:
        return None
    time = TimeAxis(view.seconds)
    strip = [_phase_bars(view, time, phase) for phase in (*RUNNING, "idle")]
    data = [bars for bars in strip if bars["x"]]
    data += [bars | _behind() for bars in data]
    budget = max(stats.host_kv_budget_bytes for stats in view.stats)
    if any(sample.host_kv for _, sample in view.samples):
        fills = [sample.host_kv / budget for _, sample in view.samples]
        data.append(_fill(view, time, fills, "host buffer in use", _BUFFER, "rgba(157, 107, 166, 0.22)"))
    pool = max(max(stats.device_kv_pool_bytes for stats in view.stats), 1)
    fills = [min(1.0, sample.device_kv / pool) for _, sample in view.samples]
    data.append(_fill(view, time, fills, "device pools in use", _POOL, None))
    layout = plain_layout("", "", height=400, barmode="overlay", hovermode="closest")
    layout |= {
        "xaxis": time.layout("of the job", anchor="y"),
        "yaxis": axis("in use", domain=[0, 0.84], tickformat=".0%", range=[0, 1.03]),
        "yaxis2": axis("", domain=[0.89, 1], range=[0, 1], showgrid=False, showticklabels=False),
        "yaxis3": axis("", overlaying="y", range=[0, 1], visible=False),
        "shapes": _seams(view, time),
    }
    layout["margin"] |= {"l": 70}
    return {"data": data, "layout": layout}


def _phase_bars(view: JobView, time: TimeAxis, phase: str) -> Figure:
    spans = [(begin, seconds) for begin, seconds, name in view.phases if name == phase]
    return {
        "type": "bar",
        "orientation": "h",
        "name": NAMES.get(phase, phase),
        "legendgroup": phase,
        "marker": {"color": COLOURS[phase], "line": {"width": 0}},
        "base": [time(begin) for begin, _ in spans],
        "x": [time(seconds) for _, seconds in spans],
        "y": [0.5] * len(spans),
        "width": 1,
        "yaxis": "y2",
        "customdata": [f"{NAMES.get(phase, phase)}: {time_text(seconds)}" for _, seconds in spans],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _behind() -> Figure:
    """What makes bars of the strip a faint ground of the figure below."""
    return {"yaxis": "y3", "opacity": 0.1, "showlegend": False, "hoverinfo": "skip", "hovertemplate": None}


def _fill(
    view: JobView, time: TimeAxis, fills: Sequence[float], name: str, colour: str, ground: str | None
) -> Figure:
    x: list[float | None] = []
    y: list[float | None] = []
    seams = {sitting.begin for sitting in view.sittings[1:]}
    for (place, _), fill in zip(view.samples, fills, strict=True):
        if place in seams:
            x.append(None)
            y.append(None)
        x.append(time(place))
        y.append(round(fill, 4))
    line = {"color": colour, "width": 2 if ground else 1.2}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": line if ground else line | {"dash": "dot"},
        "hovertemplate": f"{name}: %{{y:.0%}}<extra></extra>",
        **({"fill": "tozeroy", "fillcolor": ground} if ground else {}),
    }


def _seams(view: JobView, time: TimeAxis) -> list[Figure]:
    """Lines where one sitting ends and the next begins."""
    line = {"color": INK, "width": 1.5, "dash": "dash"}
    return [
        {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        for x in (time(sitting.begin) for sitting in view.sittings[1:])
    ]


# ---- rates ------------------------------------------------------------------------------------------------


def rate_figure(view: JobView) -> Figure | None:
    """Prompt and output tokens per second over time."""
    if not view.prompt_tokens:
        return None
    time = TimeAxis(view.seconds)
    data = [
        _rate(view, time, "prompt_tokens", "prompt tokens/s", _PROMPT, "rgba(58, 145, 136, 0.15)"),
        _rate(view, time, "output_tokens", "output tokens/s", _OUTPUT, "rgba(47, 102, 144, 0.15)"),
    ]
    layout = plain_layout("", "tokens/s", height=300, hovermode="x unified")
    layout["xaxis"] = time.layout("of the job")
    layout["yaxis"] |= {"rangemode": "tozero", "tickformat": ",.3~s"}
    layout["shapes"] = _seams(view, time)
    layout["margin"] |= {"l": 70}
    return {"data": data, "layout": layout}


def _rate(view: JobView, time: TimeAxis, field: str, name: str, colour: str, ground: str) -> Figure:
    x: list[float | None] = []
    y: list[float | None] = []
    for sitting in view.sittings:
        points = [
            (sitting.place(sample.at), float(getattr(sample, field))) for sample in sitting.run.timeline
        ]
        for begin, end, rate in rates(points, view.seconds / _BINS):
            x += [time(begin), time(end)]
            y += [round(rate, 2)] * 2
        x.append(None)
        y.append(None)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 1.8},
        "fill": "tozeroy",
        "fillcolor": ground,
        "hovertemplate": "%{y:,.0f}",
    }


def rates(points: Sequence[tuple[float, float]], width: float) -> list[tuple[float, float, float]]:
    """(begin, end, rise per second) of a counter given by (seconds, count), over at least `width` seconds each."""
    found, before = [], points[0] if points else (0.0, 0.0)
    for index, (moment, count) in enumerate(points):
        seconds = moment - before[0]
        if seconds >= width or (index == len(points) - 1 and seconds > 0):
            found.append((before[0], moment, (count - before[1]) / seconds))
            before = moment, count
    return found


# ---- where the time went ----------------------------------------------------------------------------------


def time_figure(view: JobView) -> Figure | None:
    """A bar for each phase, divided by what its time went to."""
    if not view.parts:
        return None
    phases = list(view.parts)
    data: list[Figure] = []
    for part, name in PARTS.items():
        seconds = [view.parts[phase][part] for phase in phases]
        if not any(seconds):
            continue
        shares = [one / view.seconds for one in seconds]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "marker": {"color": _PARTS[part]},
                "x": [round(one, 6) for one in seconds],
                "y": [NAMES.get(phase, phase) for phase in phases],
                "text": [f"{share:.0%}" if share >= 0.04 else "" for share in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "insidetextfont": {"color": "#ffffff"},
                "textangle": 0,
                "customdata": [
                    f"{NAMES.get(phase, phase)}, {name}: {time_text(one)}, {share:.1%} of the job"
                    for phase, one, share in zip(phases, seconds, shares, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    layout = plain_layout("", "", height=110 + 44 * len(phases), barmode="stack", bargap=0.28)
    time = TimeAxis(view.seconds)
    layout["xaxis"] |= {"title": axis("seconds")["title"]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["legend"] |= {"traceorder": "normal"}
    if time.name != "seconds":
        for trace in data:
            trace["x"] = [time(one) for one in trace["x"]]
        layout["xaxis"]["title"] = axis(time.name)["title"]
    return {"data": data, "layout": layout}


def use_figure(uses: Mapping[str, PhaseUse]) -> Figure | None:
    """Shares of the node's arithmetic and bandwidth, by phase."""
    if not uses:
        return None
    phases = [phase for phase in RUNNING if phase in uses]
    kinds = {
        "arithmetic (MFU)": ([uses[phase].arithmetic for phase in phases], "#3a9188"),
        "memory bandwidth": ([uses[phase].bandwidth for phase in phases], "#2f6690"),
    }
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "marker": {"color": colour},
            "x": [round(share, 5) for share in shares],
            "y": [NAMES.get(phase, phase) for phase in phases],
            "text": [f"{share:.1%}" for share in shares],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": f"{name} in %{{y}}: %{{x:.1%}} of the node's best<extra></extra>",
        }
        for name, (shares, colour) in kinds.items()
    ]
    most = max(max(shares) for shares, _ in kinds.values())
    layout = plain_layout("of what the node can do", "", height=130 + 56 * len(phases), bargap=0.3)
    layout["xaxis"] |= {"tickformat": ".0%", "range": [0, max(1.0, most) * 1.06]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["legend"] |= {"traceorder": "normal"}
    return {"data": data, "layout": layout}


# ---- transitions ------------------------------------------------------------------------------------------


def link_limit(hardware: HardwareSpec | None) -> float | None:
    """Bytes per second at which all ranks together can fetch weights from the host."""
    if hardware is None:
        return None
    if hardware.fetch is not None:
        return hardware.fetch * hardware.ranks
    return min(hardware.to_device * hardware.ranks, hardware.node_to_device)


def transition_figure(view: JobView) -> Figure | None:
    """The rate that each transition reached, against what the link to the host gives."""
    moved = [(at, one) for at, one in view.transitions if one.bytes]
    if not moved:
        return None
    limit = link_limit(view.hardware)
    rates = [one.bytes / max(one.moving_seconds or one.seconds, 1e-9) / 1e9 for _, one in moved]
    targets = list(dict.fromkeys(one.target for _, one in moved))
    shades = ["#d1495b", "#ed9b6d", "#9d6ba6", "#b08968"]
    data = []
    for number, target in enumerate(targets):
        own = [i for i, (_, one) in enumerate(moved) if one.target == target]
        data.append(
            {
                "type": "bar",
                "name": f"to {target}",
                "marker": {"color": shades[number % len(shades)]},
                "x": [i + 1 for i in own],
                "y": [rates[i] for i in own],
                "text": [format_bytes(moved[i][1].bytes) if len(moved) <= _NAMED else "" for i in own],
                "textposition": "outside",
                "cliponaxis": False,
                "customdata": [
                    f"to {target}: {format_bytes(moved[i][1].bytes)} in {time_text(moved[i][1].seconds)}, "
                    f"{rates[i]:.3g} GB/s"
                    for i in own
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
                "width": 0.7,
            }
        )
    layout = plain_layout("transition", "GB/s from the host", height=300)
    layout["xaxis"] |= {"range": [0.3, len(moved) + 0.7], "tickformat": "d", "showgrid": False}
    layout["xaxis"] |= {"tick0": 1, "dtick": max(1, -(-len(moved) // 20))}
    _limit_line(layout, rates, None if limit is None else limit / 1e9)
    layout["margin"] |= {"l": 70}
    return {"data": data, "layout": layout}


def _limit_line(layout: Figure, rates: Sequence[float], limit: float | None) -> None:
    """The link's limit as a line; on a logarithmic axis if all stay far below it."""
    top = max([*rates, limit or 0.0])
    if limit is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": limit,
                "y1": limit,
                "line": {"color": INK, "width": 1.5, "dash": "dash"},
            }
        ]
    logarithmic = top > 20 * min(rates)
    if limit is not None:
        layout["annotations"] = [
            {
                "text": f"the link's limit: {limit:.3g} GB/s",
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": log10(limit) if logarithmic else limit,
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12, "color": FAINT},
            }
        ]
    if logarithmic:
        low = min(rates)
        layout["yaxis"] |= {"type": "log", "range": [log10(low / 3), log10(top * 2)], "dtick": 1}
    else:
        layout["yaxis"] |= {"range": [0, top * 1.2]}


# ---- lengths, failures ------------------------------------------------------------------------------------


def length_figure(view: JobView) -> Figure | None:
    """How many sequences had prompts and outputs of which length."""
    kinds = [("prompts", "prompt tokens", _PROMPT), ("outputs", "output tokens", _OUTPUT)]
    counted = [(view.lengths(field), title, colour) for field, title, colour in kinds]
    if not all(counts for counts, _, _ in counted):
        return None
    data, layout = [], plain_layout("", "", height=280, showlegend=False, bargap=0.04)
    for number, (counts, title, colour) in enumerate(counted):
        bins = length_bins(counts)
        suffix = "" if number == 0 else "2"
        data.append(
            {
                "type": "bar",
                "name": title,
                "marker": {"color": colour},
                "x": list(range(len(bins))),
                "y": [count for _, _, count in bins],
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "customdata": [
                    f"{low:,} to {high - 1:,} tokens" if high > low + 1 else f"{low:,} tokens"
                    for low, high, _ in bins
                ],
                "hovertemplate": "%{customdata}: %{y:,} sequences<extra></extra>",
            }
        )
        every = -(-len(bins) // 8)
        layout[f"xaxis{suffix}"] = axis(
            title,
            domain=[0, 0.45] if number == 0 else [0.55, 1],
            anchor=f"y{suffix}",
            tickvals=[i - 0.5 for i in range(0, len(bins), every)],
            ticktext=[f"{bins[i][0]:,}" for i in range(0, len(bins), every)],
            showgrid=False,
        )
        layout[f"yaxis{suffix}"] = axis(
            "sequences" if number == 0 else "", anchor=f"x{suffix}", tickformat=",d", rangemode="tozero"
        )
    layout["margin"] |= {"l": 70}
    return {"data": data, "layout": layout}


def length_bins(counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(least length, least length of the next bin, sequences) without gaps: equal bins where lengths are alike, bins
    that double in width every few where they are not."""
    low, high = min(counts), max(counts) + bucket_width(max(counts))
    if high <= _ALIKE * _median(counts):
        step = bucket_width(high - 1)
        edges = list(range(low // step * step, high + step, step))
    else:
        edges = _growing(low, high)
    bins = [[a, b, 0] for a, b in pairwise(edges) if b > low and a < high]
    for least, count in sorted(counts.items()):
        next(one for one in bins if one[0] <= least < one[1])[2] += count
    return [(a, b, count) for a, b, count in bins]


def _median(counts: Mapping[int, int]) -> int:
    half, below = sum(counts.values()) / 2, 0
    for least in sorted(counts):
        below += counts[least]
        if below >= half:
            return max(least, 1)
    return 1


def _growing(low: int, high: int) -> list[int]:
    """Edges of bins that hold four buckets each."""
    edges = [low // (4 * bucket_width(low)) * 4 * bucket_width(low)]
    while edges[-1] < high:
        edges.append(edges[-1] + 4 * bucket_width(edges[-1]))
    return edges


def failure_figure(view: JobView) -> Figure | None:
    """Failed rows by reason."""
    if not view.failures:
        return None
    shown = view.failures[:12]
    data = {
        "type": "bar",
        "orientation": "h",
        "marker": {"color": "#d1495b"},
        "x": [count for _, count in shown],
        "y": [code for code, _ in shown],
        "text": [f"{count:,}" for _, count in shown],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:,} rows<extra></extra>",
    }
    layout = plain_layout("rows", "", height=90 + 34 * len(shown), bargap=0.3)
    layout["xaxis"] |= {"rangemode": "tozero", "tickformat": ",d", "range": [0, shown[0][1] * 1.12]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return {"data": [data], "layout": layout}
