"""The summary at the end of a run, as aligned text of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from seesaw.core.stats import EngineStats, RankLoss, TransitionRecord
from seesaw.core.units import format_bytes

_LABEL = 12
_MOST_CODES = 6


def format_summary(
    stats: EngineStats,
    *,
    rows_answered: int,
    rows_failed: int,
    rows_before: int = 0,
    failures: Mapping[str, int] | None = None,
    elapsed_seconds: float,
    files: Sequence[tuple[str, Path]] = (),
) -> str:
    """Lines of label and text, without a newline at the end.

    `rows_before` of the rows were done in earlier sessions; tokens and times are of this one.
    `failures` counts failed rows by code, `elapsed_seconds` is the job's, from its first row to its last;
    rates are tokens over that time. `files` are labels and paths to name.
    """
    lines = [
        ("rows", _rows(rows_answered, rows_failed, rows_before, failures or {})),
        ("tokens", _tokens(stats, elapsed_seconds)),
        ("time", _time(stats, elapsed_seconds)),
        ("plan", stats.plan),
        *_transitions(stats.transitions),
        *_losses(stats.rank_losses),
        ("host buffer", _host(stats)),
        ("preemptions", _preemptions(stats)),
        ("device", _device(stats)),
        *((label, str(path)) for label, path in files),
    ]
    return "\n".join(f"{label:<{_LABEL}}  {text}" for label, text in lines)


def format_seconds(seconds: float) -> str:
    """`8.3 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _rows(answered: int, failed: int, before: int, failures: Mapping[str, int]) -> str:
    text = f"{answered:,} answered, {failed:,} failed"
    if before:
        text += f" (of which {before:,} from before)"
    if failures:
        ordered = sorted(failures.items(), key=lambda item: -item[1])
        named = [f"{code} {count:,}" for code, count in ordered[:_MOST_CODES]]
        others = sum(count for _, count in ordered[_MOST_CODES:])
        text += "\n" + _indented([*named, *([f"others {others:,}"] if others else [])])
    return text


def _indented(items: Sequence[str], width: int = 84) -> str:
    """Items in as many lines as they need, under the text column."""
    lines = [""]
    for i, item in enumerate(items):
        piece = item + ("," if i + 1 < len(items) else "")
        if lines[-1] and len(lines[-1]) + 1 + len(piece) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {piece}".lstrip()
    return "\n".join(" " * (_LABEL + 2) + line for line in lines)


def _tokens(stats: EngineStats, elapsed: float) -> str:
    seconds = max(elapsed, 1e-9)
    return (
        f"{stats.prompt_tokens:,} in ({stats.prompt_tokens / seconds:,.0f}/s), "
        f"{stats.output_tokens:,} out ({stats.output_tokens / seconds:,.0f}/s)"
    )


def _time(stats: EngineStats, elapsed: float) -> str:
    phases = {phase: seconds for phase, seconds in stats.seconds_per_phase.items() if seconds > 0}
    text = format_seconds(elapsed)
    if not phases or elapsed <= 0:
        return text
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    shares = [f"{phase} {seconds / elapsed:.0%}" for phase, seconds in ordered]
    return f"{text}: {', '.join(shares)}"


def _transitions(records: Sequence[TransitionRecord]) -> list[tuple[str, str]]:
    """One line per target and mode, since there may be many transitions."""
    if not records:
        return [("transitions", "none")]
    ordered = sorted(records, key=lambda record: (record.target, record.mode))
    lines = []
    for (target, mode), group in groupby(ordered, key=lambda record: (record.target, record.mode)):
        some = list(group)
        moved, seconds = sum(r.bytes for r in some), sum(r.seconds for r in some)
        lines.append(
            f"{len(some):,} to {target} ({mode}): {format_bytes(moved)} in {format_seconds(seconds)}, "
            f"{format_bytes(moved / len(some))} and {seconds / len(some) * 1e3:,.0f} ms each"
        )
    return list(zip(["transitions", *[""] * (len(lines) - 1)], lines, strict=True))


def _losses(losses: Sequence[RankLoss]) -> list[tuple[str, str]]:
    """A line for each time that ranks were lost."""
    lines = [
        f"{', '.join(map(str, loss.ranks))} of {loss.before}, on under {loss.after} after "
        f"{format_seconds(loss.seconds)}; {loss.kept:,} sequences kept, {loss.restarted:,} restarted"
        for loss in losses
    ]
    return list(zip(["lost ranks", *[""] * len(lines)], lines, strict=False))


def _host(stats: EngineStats) -> str:
    return (
        f"peak {_of(stats.host_kv_peak_bytes, stats.host_kv_budget_bytes)}; swapped out "
        f"{format_bytes(stats.swapped_out_bytes)}, in {format_bytes(stats.swapped_in_bytes)}"
    )


def _preemptions(stats: EngineStats) -> str:
    return f"{stats.preemptions_swapped:,} swapped, {stats.preemptions_recomputed:,} recomputed"


def _device(stats: EngineStats) -> str:
    peaks, budget = stats.device_memory_peak_bytes, stats.device_memory_budget_bytes
    if not peaks:
        return "no ranks"
    ranks = f"{len(peaks)} ranks" if len(peaks) > 1 else "1 rank"
    low, high = min(peaks), max(peaks)
    even = format_bytes(low) == format_bytes(high)
    spread = "" if even else f" (least {format_bytes(low)})"
    return f"{ranks}, peak {_of(high, budget)} per rank{spread}"


def _of(used: int, budget: int) -> str:
    share = f" ({used / budget:.0%})" if budget else ""
    return f"{format_bytes(used)} of {format_bytes(budget)}{share}"
