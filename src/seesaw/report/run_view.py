"""`JobView`: the sittings of a job put one after the other, as a page shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from seesaw.core.hardware import HardwareSpec
from seesaw.core.stats import EngineStats, TransitionRecord
from seesaw.recording.record import Record, Run, RunSetup, Sample

_K = TypeVar("_K")
_N = TypeVar("_N", int, float)

RUNNING = ("prefill", "decode", "mixed", "transition")
"""Phases in the order in which pages name them."""

PARTS = {
    "ranks": "ranks compute",
    "sampling": "ranks sample",
    "control": "control process",
    "files": "job input and output",
}
"""What the time of a phase went to, by key."""


@dataclass(frozen=True, slots=True)
class Sitting:
    """One run of the job and where it lies on the time axis of the page."""

    run: Run
    begin: float
    """Seconds of the page's time axis."""
    zero: float
    """The engine's clock at `begin`."""
    seconds: float

    def place(self, at: float) -> float:
        """Where the engine's second `at` lies on the time axis."""
        return self.begin + min(max(at - self.zero, 0.0), self.seconds)


class JobView:
    """What a record says of a job as a whole. Times are in seconds, sittings lie one after the other."""

    def __init__(self, record: Record) -> None:
        self.runs = record.runs
        self.sittings: list[Sitting] = []
        begin = 0.0
        for run in record.runs:
            zero = run.timeline[0].at if run.timeline else 0.0
            seconds = max(_seconds(run, zero), 1e-9)
            self.sittings.append(Sitting(run, begin, zero, seconds))
            begin += seconds
        self.seconds = begin

    @property
    def last(self) -> Run:
        """The latest sitting."""
        return self.runs[-1]

    @property
    def setup(self) -> RunSetup | None:
        """Of the latest sitting that got so far."""
        return next((run.setup for run in reversed(self.runs) if run.setup is not None), None)

    @property
    def hardware(self) -> HardwareSpec | None:
        """The node, if it was measured."""
        return None if self.setup is None else self.setup.hardware

    @property
    def stats(self) -> list[EngineStats]:
        """Of the sittings that have any."""
        return [run.stats for run in self.runs if run.stats is not None]

    @property
    def answered(self) -> int:
        """Rows."""
        return sum(run.rows_answered for run in self.runs)

    @property
    def failed(self) -> int:
        """Rows."""
        return sum(run.rows_failed for run in self.runs)

    @cached_property
    def failures(self) -> list[tuple[str, int]]:
        """Failed rows by code, the most frequent first."""
        total: Counter[str] = Counter()
        for run in self.runs:
            total.update(run.failures)
        return total.most_common()

    @property
    def prompt_tokens(self) -> int:
        """Computed."""
        return sum(stats.prompt_tokens for stats in self.stats)

    @property
    def output_tokens(self) -> int:
        """Generated."""
        return sum(stats.output_tokens for stats in self.stats)

    @property
    def plans(self) -> list[str]:
        """That ran, in order."""
        return list(dict.fromkeys(plan for run in self.runs for _, plan in run.plans if plan != "auto"))

    def total(self, field: str) -> dict[str, float]:
        """A field of `EngineStats` that counts by phase, summed over sittings."""
        return _summed(getattr(stats, field) for stats in self.stats)

    @cached_property
    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds by phase and part (`PARTS`); those of a phase add up to its time."""
        wall, waited = self.total("wall_seconds"), self.total("seconds_per_phase")
        host, sampling = self.total("host_seconds"), self.total("rank_host_seconds")
        parts = {}
        for phase in (p for p in RUNNING if wall.get(p)):
            wait = min(waited.get(phase, 0.0), wall[phase])
            sample = min(sampling.get(phase, 0.0), wait)
            control = min(host.get(phase, 0.0), wall[phase] - wait)
            rest = wall[phase] - wait - control
            parts[phase] = {"ranks": wait - sample, "sampling": sample, "control": control, "files": rest}
        return parts

    @property
    def outside(self) -> float:
        """Seconds of the job in which no phase was under way."""
        return max(0.0, self.seconds - sum(sum(parts.values()) for parts in self.parts.values()))

    @cached_property
    def samples(self) -> list[tuple[float, Sample]]:
        """With their place on the time axis."""
        return [(s.place(sample.at), sample) for s in self.sittings for sample in s.run.timeline]

    @cached_property
    def phases(self) -> list[tuple[float, float, str]]:
        """(begin, seconds, phase) on the time axis."""
        spans = [
            (s.place(span.start), s.place(span.start + span.seconds), span.phase)
            for s in self.sittings
            for span in s.run.history.phases
        ]
        return [(begin, end - begin, phase) for begin, end, phase in spans if end > begin]

    @cached_property
    def transitions(self) -> list[tuple[float, TransitionRecord]]:
        """Those that are kept, with the place of their end on the time axis."""
        return [(s.place(record.at), record) for s in self.sittings for record in s.run.transitions]

    @property
    def transition_count(self) -> int:
        """All of them."""
        return sum(run.transition_count for run in self.runs)

    def lengths(self, field: str) -> dict[int, int]:
        """`prompts` or `outputs` of the histories, summed."""
        return _summed(getattr(run.history, field) for run in self.runs)


def _seconds(run: Run, zero: float) -> float:
    """Of a sitting: its job's, or as far as it was observed where it did not come to its end."""
    seen = run.timeline[-1].at - zero if run.timeline else 0.0
    spans = run.history.phases
    until = spans[-1].start + spans[-1].seconds - zero if spans else 0.0
    return max(run.elapsed_seconds, seen, until)


def _summed(counts: Iterable[dict[_K, _N]]) -> dict[_K, _N]:
    total: dict[_K, _N] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total[key] + value if key in total else value
    return total
