"""What a bench finds, and the arithmetic on it: medians, spreads, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from seesaw.bench.contestant import Contestant
from seesaw.bench.floor import Floor
from seesaw.bench.profiles import PhaseTimes
from seesaw.bench.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One counted run of one contestant."""

    round: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    others: float = 0.0
    """Share of the machine's cores that processes outside the contestant kept busy meanwhile."""
    details: dict[str, Any] = field(default_factory=dict)
    """What Seesaw adds; see `contestants.seesaw_engine.difference`."""

    @property
    def rate(self) -> float:
        """Prompt and output tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds


@dataclass(slots=True, kw_only=True)
class Entry:
    """A contestant on a workload."""

    contestant: Contestant
    about: dict[str, Any] = field(default_factory=dict)
    start_seconds: float | None = None
    runs: list[Run] = field(default_factory=list)
    error: str | None = None
    """Why it has no more runs."""
    floor: Floor | None = None
    profile: dict[str, PhaseTimes] = field(default_factory=dict)
    """By phase, if it was asked for."""
    copy_rate: float | None = None
    """Bytes per second that its ranks together can copy."""

    @property
    def name(self) -> str:
        """The contestant's."""
        return self.contestant.name

    @property
    def rates(self) -> list[float]:
        """Total tokens per second of each run."""
        return [run.rate for run in self.runs]

    @property
    def rate(self) -> float | None:
        """Median of total tokens per second; None if no run counted."""
        return median(self.rates)

    @property
    def seconds(self) -> float | None:
        """Median of the seconds of a run."""
        return median(run.seconds for run in self.runs)

    def phases(self) -> dict[str, float]:
        """Median seconds of each phase."""
        return self.by_key("seconds_per_phase")

    def by_key(self, name: str) -> dict[str, float]:
        """Medians over the runs of a mapping in their details."""
        keys = dict.fromkeys(key for run in self.runs for key in run.details.get(name, {}))
        return {
            key: statistics.median(run.details.get(name, {}).get(key, 0) for run in self.runs) for key in keys
        }

    def transitions(self) -> tuple[float, float, float]:
        """Medians over the runs: number of transitions, seconds that the busiest rank spent moving, bytes moved."""
        lists = [run.details.get("transitions", []) for run in self.runs]
        if not lists:
            return 0.0, 0.0, 0.0
        return (
            statistics.median(len(one) for one in lists),
            statistics.median(sum(t["moving_seconds"] for t in one) for one in lists),
            statistics.median(sum(t["bytes"] + t["copied_bytes"] for t in one) for one in lists),
        )


@dataclass(slots=True, kw_only=True)
class WorkloadResult:
    """All contestants on one workload."""

    workload: Workload
    entries: list[Entry]

    def best(self, *kinds: str) -> Entry | None:
        """The entry with the highest median rate of the groups; see `group`."""
        return best(entry for entry in self.entries if group(entry.contestant) in kinds)


def group(contestant: Contestant) -> str:
    """`resharded` or `static` for plans of Seesaw (`static` has one layout for both phases), `auto` where the planner
    chooses, else its kind."""
    if contestant.planned:
        return "auto"
    plan = contestant.plan
    if plan is None:
        return contestant.kind
    return "resharded" if plan.reshards else "static"


def best(entries: Iterable[Entry]) -> Entry | None:
    """The entry with the highest median rate, if any has runs."""
    ran = [(entry.rate, i, entry) for i, entry in enumerate(entries) if entry.rate is not None]
    return max(ran)[2] if ran else None


def ratio(entry: Entry | None, reference: Entry | None) -> float | None:
    """Median rate over the reference's; None if either has no run."""
    if entry is None or reference is None or entry.rate is None or reference.rate is None:
        return None
    return entry.rate / reference.rate


def median(values: Iterable[float]) -> float | None:
    """The median, or None of nothing."""
    numbers: Sequence[float] = list(values)
    return statistics.median(numbers) if numbers else None


def comparisons(result: WorkloadResult) -> list[tuple[str, Entry, Entry, float]]:
    """The ratios that are asked for again and again: (what, entry, over which, ratio of medians)."""
    planned = result.best("auto")
    chosen = "" if planned is None else planned.about.get("plan", "")
    pairs = [
        ("best Seesaw over best vLLM", result.best("resharded", "static"), result.best("vllm")),
        ("best re-sharded over best static plan", result.best("resharded"), result.best("static")),
        (
            f"plan auto, which took {chosen}, over the best plan named",
            planned,
            result.best("resharded", "static"),
        ),
    ]
    found = []
    for what, entry, reference in pairs:
        value = ratio(entry, reference)
        if entry is not None and reference is not None and value is not None:
            found.append((what, entry, reference, value))
    return found
