"""A run drawn: what a job did, how fast, what its time went to, and what was expected of it, on one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from seesaw.core.units import format_bytes
from seesaw.recording.efficiency import PhaseUse, phase_use
from seesaw.recording.prediction import Prediction
from seesaw.recording.record import Record, Run, RunSetup
from seesaw.report.causes import time_text
from seesaw.report.html import Figure, definitions, document, figure_place, section, table, tiles
from seesaw.report.run_figures import (
    NAMES,
    failure_figure,
    length_figure,
    link_limit,
    rate_figure,
    time_figure,
    timeline_figure,
    transition_figure,
    use_figure,
)
from seesaw.report.run_view import RUNNING, JobView

_PROFILE = "A profile of the machine (seesaw profile), made before a run, adds this"
_DOING = {
    "ranks": "the ranks' own work in {phase}",
    "sampling": "sampling on the ranks in {phase}",
    "control": "the control process in {phase}",
    "files": "reading and writing rows in {phase}",
}


def page(record: Record, prediction: Prediction | str) -> str:
    """The page as HTML. `prediction` is of the latest sitting, or says why there is none."""
    view = JobView(record)
    uses = _uses(view)
    body = [tiles(_tiles(view)), definitions(_about(view))]
    figures: dict[str, Figure] = {}
    for title, caption, figure in _figures(view, uses):
        name = f"figure{len(figures)}"
        if figure is not None:
            figures[name] = figure
        body.append(section(title, caption, "" if figure is None else figure_place(name)))
    body.append(_expected(view, prediction))
    return document(title=_title(view.last), answer=answer(view), body=body, figures=figures)


def answer(view: JobView) -> str:
    """How fast the job was and what took most of its time, in a sentence or two."""
    rows = view.answered + view.failed
    if not rows:
        return (
            f"{_state(view)} No row has its line yet."
            if view.last.state != "finished"
            else "The job was empty."
        )
    failed = "" if not view.failed else ", all failed" if not view.answered else f", {view.failed:,} failed"
    text = f"{rows:,} rows{failed} in {time_text(view.seconds)}: {_rate(rows / view.seconds)} rows/s"
    if view.prompt_tokens:
        tokens = view.prompt_tokens + view.output_tokens
        text += f", {_rate(tokens / view.seconds)} tokens/s"
    text += "."
    if view.parts:
        seconds, part, phase = max(
            (seconds, part, phase) for phase, parts in view.parts.items() for part, seconds in parts.items()
        )
        doing = _DOING[part].format(phase=NAMES.get(phase, phase) if phase != "mixed" else "mixed batches")
        text += f" Most of the time, {seconds / view.seconds:.0%}, went to {doing}."
    return f"{text} {_state(view)}".rstrip()


def _state(view: JobView) -> str:
    run = view.last
    match run.state:
        case "finished":
            return ""
        case "interrupted":
            return "The job was interrupted and can be resumed."
        case "failed":
            return f"The job failed: {run.error}"
        case _:
            return (
                f"The job was killed, or was still running when this was recorded ({_moment(run.written)})."
            )


def _title(run: Run) -> str:
    inputs = run.command.get("input") or ["?"]
    name = Path(inputs[0]).name + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")
    model = Path(run.command.get("model", "?"))
    return f"{name} through {'/'.join(model.parts[-2:]) if model.is_absolute() else model}"


def _tiles(view: JobView) -> list[tuple[str, str]]:
    seconds = view.seconds
    shown = [(f"{view.answered:,}", "rows answered")]
    if view.failed:
        shown.append((f"{view.failed:,}", "rows failed"))
    shown += [
        (time_text(seconds), "time" if len(view.runs) == 1 else f"time, {len(view.runs)} sittings"),
        (_rate((view.answered + view.failed) / seconds), "rows/s"),
    ]
    if view.prompt_tokens:
        shown += [
            (_rate(view.prompt_tokens / seconds), "prompt tokens/s"),
            (_rate(view.output_tokens / seconds), "output tokens/s"),
        ]
    if view.transition_count:
        shown.append(
            (f"{view.transition_count:,}", "transition" if view.transition_count == 1 else "transitions")
        )
    return shown


def _about(view: JobView) -> Iterable[tuple[str, str]]:
    run, setup, stats = view.last, view.setup, view.stats
    first = view.runs[0]
    yield "when", f"{_moment(first.started)} to {_moment(run.written)} on {run.machine}"
    if view.plans:
        yield "plan", ", then ".join(view.plans)
    yield "model", str(run.command.get("model", "?")) + (f": {_shape(setup)}" if setup is not None else "")
    if setup is not None:
        mode = f"; transitions: {setup.transition}" if "->" in setup.plan else ""
        yield (
            "settings",
            f"{setup.ranks} × {setup.device}, {setup.dtype}, policy {setup.policy}, chunk {setup.chunk:,}, at most "
            f"{setup.max_running:,} sequences a replica, {setup.max_model_len:,} tokens each{mode}",
        )
        budget = f"{format_bytes(setup.device_memory)} a rank, {format_bytes(setup.host_kv)} host buffer"
        yield "memory", budget + (f" (peak {_peak(view)})" if stats and setup.host_kv else "")
    if stats:
        moved = sum(s.swapped_out_bytes for s in stats), sum(s.swapped_in_bytes for s in stats)
        swapped = sum(s.preemptions_swapped for s in stats)
        again = sum(s.preemptions_recomputed for s in stats)
        yield (
            "KV moved",
            f"{format_bytes(moved[0])} to the host, {format_bytes(moved[1])} back; {swapped:,} sequences parked, "
            f"{again:,} computed again",
        )
    yield "output", str(run.command.get("output", "?"))
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    yield "versions", f"seesaw {run.seesaw}, {versions}"
    if len(view.runs) > 1:
        yield "sittings", "\n".join(_sitting(number, run) for number, run in enumerate(view.runs, start=1))


def _shape(setup: RunSetup) -> str:
    spec = setup.spec
    heads = f"{spec.heads} heads ({spec.kv_heads} of KV) of {spec.head_dim}"
    return f"{spec.family}, {spec.layers} layers of width {spec.hidden:,}, {heads}"


def _sitting(number: int, run: Run) -> str:
    ended = {"running": "killed, or still running"}.get(run.state, run.state)
    rows = f"{run.rows_answered:,} rows answered, {run.rows_failed:,} failed"
    return f"{number}: {_moment(run.started)}, {rows}, {ended}"


def _peak(view: JobView) -> str:
    peak = max(stats.host_kv_peak_bytes for stats in view.stats)
    budget = max(stats.host_kv_budget_bytes for stats in view.stats)
    return f"{peak / budget:.0%}" if budget else format_bytes(peak)


# ---- sections ---------------------------------------------------------------------------------------------


def _figures(view: JobView, uses: dict[str, PhaseUse]) -> Iterable[tuple[str, str, Figure | None]]:
    """(title, caption, figure) of each section. One without a figure says in its caption why there is none."""
    if not view.phases:
        yield "Phases", "No request reached the ranks.", None
    else:
        two = "transition" in view.parts
        text = (
            "Prefill fills the host buffer with the KV of prompts, decoding empties it; each turn is a transition."
            if two
            else "What the ranks were doing, and how much of the memory for KV was in use."
        )
        yield "Phases and buffers", text + _sittings(view), timeline_figure(view)
        yield "Tokens per second", "Tokens of prompts computed, and tokens generated.", rate_figure(view)
        yield "Where the time went", _time_caption(view), time_figure(view)
        if uses:
            yield "Use of the devices", _USE, use_figure(uses)
        else:
            yield "Use of the devices", f"{_PROFILE}: {_why(view)}.", None
        if two:
            yield "Transitions", _transition_caption(view), transition_figure(view)
    lengths = length_figure(view)
    if lengths is not None:
        yield "Lengths", "Sequences that ended, by the tokens of their prompt and of their output.", lengths
    if view.failures:
        yield "Failed rows", "By reason; each has its line in the error file.", failure_figure(view)
    elif view.failed:
        yield "Failed rows", f"{view.failed:,} rows failed; the error file says why.", None
    else:
        yield "Failed rows", "No row failed.", None


_USE = (
    "Over the whole time of a phase: arithmetic that its tokens needed, against the highest rate of matrix products "
    "that was measured on this machine; weights and KV that were read, against its memory bandwidth."
)


def _sittings(view: JobView) -> str:
    return " Dashed lines part the sittings." if len(view.runs) > 1 else ""


def _why(view: JobView) -> str:
    setup = view.setup
    if setup is None:
        return "the run ended before its plan was known"
    return setup.no_hardware or f"the profile has nothing on {setup.dtype}"


def _time_caption(view: JobView) -> str:
    text = (
        "What the control process waited for: the ranks computing (waits for each other included), choosing tokens "
        "and preparing batches, its own scheduling, and the job's files with the tokeniser."
    )
    if view.outside > 0.01 * view.seconds:
        text += f" Beside this, {time_text(view.outside)} went to getting started and finishing."
    return text


def _transition_caption(view: JobView) -> str:
    moved = sum(run.transition_bytes for run in view.runs)
    seconds = view.total("wall_seconds").get("transition", 0.0)
    copied = sum(one.copied_bytes for _, one in view.transitions)
    share = f"{seconds / view.seconds:.1%} of the job"
    text = f"{format_bytes(moved)} of weights came from the host, in {time_text(seconds)} ({share})"
    if copied:
        text += f"; {format_bytes(copied)} changed places on the devices"
    if not moved:
        return f"{text}: every rank holds both shardings, so nothing has to be fetched."
    text += ". Bars: bytes fetched by all ranks over the longest time that one of them moved data"
    if link_limit(view.hardware) is None:
        return f"{text}. {_PROFILE} to compare with: the link's limit."
    return text + "; the dashed line is what the links gave when the machine was profiled."


def _uses(view: JobView) -> dict[str, PhaseUse]:
    setup = view.setup
    if setup is None or setup.hardware is None:
        return {}
    return phase_use(setup.spec, setup.dtype, setup.ranks, setup.hardware, view.total)


def _expected(view: JobView, prediction: Prediction | str) -> str:
    """Predicted against measured, as a table."""
    title = "Predicted and measured"
    if isinstance(prediction, str):
        return section(title, f"There is no prediction: {prediction}.", "")
    stats = view.last.stats
    assert stats is not None, "a run that came to its end has statistics"
    rows = []
    for phase in RUNNING:
        before, after = prediction.phases.get(phase, 0.0), stats.seconds_per_phase.get(phase, 0.0)
        if before or after:
            rows.append(_compared(NAMES.get(phase, phase), before, after))
    rest = view.last.elapsed_seconds - sum(stats.seconds_per_phase.values())
    rows.append(["control process, files", "–", time_text(rest), "–"])
    rows.append(_compared("in all", prediction.seconds, view.last.elapsed_seconds))
    sample = prediction.replayed < prediction.sequences
    text = (
        f"The twin replayed {prediction.replayed:,}{f' of {prediction.sequences:,}' if sample else ''} sequences "
        "with the lengths that they turned out to have, on ranks as the profile has them. It knows of no control "
        "process and no files. Times by phase are waits for the ranks."
    )
    return section(title, text, table(["", "predicted", "measured", "measured ÷ predicted"], rows))


def _compared(name: str, predicted: float, measured: float) -> list[str]:
    ratio = "–" if not predicted else f"{measured / predicted:.{0 if measured > 10 * predicted else 2}f}"
    return [name, time_text(predicted), time_text(measured), ratio]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _moment(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S %Z")
