"""What the time of a simulated job went to, in words: names of causes, what limits a plan, how two plans differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seesaw.report.summary import format_seconds

if TYPE_CHECKING:
    from seesaw.planning.twin import Simulated


_NOTEWORTHY = 0.01
"""Share of a job from which on something is told."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause of the twin (`planning.twin.CAUSES`) as people read it."""

    name: str
    meaning: str
    """What happens meanwhile, in a few words."""
    remedy: str
    """What would make it less."""


CAUSES: dict[str, Cause] = {
    "weights": Cause(
        "reading weights",
        "products bound by memory",
        "larger batches (more memory for KV) or faster device memory",
    ),
    "arithmetic": Cause(
        "arithmetic",
        "products bound by arithmetic",
        "faster devices; no plan can save this work",
    ),
    "attention": Cause(
        "attention",
        "scores over the KV of a sequence",
        "faster device memory, or KV of fewer bits (--kv fp8)",
    ),
    "activations": Cause(
        "activations",
        "norms, rotation and the like",
        "faster device memory",
    ),
    "all_reduce": Cause(
        "all-reduce",
        "tensor-parallel ranks add up, and wait",
        "a faster link between the devices, or less tensor parallelism",
    ),
    "hand_over": Cause(
        "hand-over",
        "from one stage to the next",
        "a faster link between the devices, or fewer pipeline stages",
    ),
    "overhead": Cause(
        "overhead",
        "starting operators and steps",
        "larger batches, so that there are fewer steps",
    ),
    "swap": Cause(
        "waiting for swaps",
        "for KV from the host buffer",
        "a faster link to host memory",
    ),
    "transition": Cause(
        "transition",
        "weights change layout",
        "a larger host buffer (--host-kv), so that layouts change less often",
    ),
    "bubble": Cause(
        "pipeline bubbles",
        "a stage waits for another",
        "more micro-batches in flight, or fewer pipeline stages",
    ),
    "idle": Cause(
        "idle",
        "no work: too few requests",
        "more requests at once, or lengths that differ less",
    ),
}
"""By the key that the twin uses, in its order."""

PHASES: dict[str, str] = {
    "prefill": "prefill",
    "decode": "decode",
    "transition": "transition",
    "mixed": "both at once",
}
"""Names of phases. Static plans feed prompts and steps in the same batches: both at once."""


@dataclass(frozen=True, slots=True)
class Job:
    """A replayed plan under its name."""

    name: str
    replay: Simulated
    scale: float = 1.0
    """Requests of the whole job over those replayed; times are told for the whole job."""

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return self.replay.seconds * self.scale

    def share(self, seconds: float) -> float:
        """What part of the replay so many seconds are."""
        return seconds / self.replay.seconds if self.replay.seconds else 0.0


def cause_seconds(job: Job) -> dict[str, float]:
    """Seconds of each cause over all phases of the whole job, averaged over pipeline stages."""
    totals = dict.fromkeys(CAUSES, 0.0)
    for report in job.replay.phases.values():
        for cause, seconds in report.causes.items():
            totals[cause] += seconds * job.scale
    return totals


def main_limit(job: Job) -> tuple[str, str, float]:
    """The (phase, cause) that takes most of the time, and its share of the job."""
    seconds, phase, cause = max(
        (seconds, phase, cause)
        for phase, report in job.replay.phases.items()
        for cause, seconds in report.causes.items()
    )
    return phase, cause, job.share(seconds)


def bound_by(job: Job) -> str:
    """`reading weights in decode`; a static plan has but one phase."""
    phase, cause, _ = main_limit(job)
    name = CAUSES[cause].name
    return name if phase in ("mixed", "transition") else f"{name} in {PHASES[phase]}"


def limits(job: Job) -> str:
    """What limits a job: each phase's share and what fills most of it, and what would help, in sentences."""
    parts = []
    for phase, report in job.replay.phases.items():
        if job.share(report.seconds) < _NOTEWORTHY:
            continue
        cause = max(report.causes, key=lambda key: report.causes[key])
        verb = "transitions take" if phase == "transition" else f"{PHASES[phase]} takes"
        text = f"{verb} {job.share(report.seconds):.0%} of the time"
        if len(job.replay.phases) == 1:
            text = f"{job.share(report.causes[cause]):.0%} of its time is {CAUSES[cause].name}"
        elif cause != phase:
            text += f" ({job.share(report.causes[cause]):.0%} is {CAUSES[cause].name})"
        parts.append(text)
    remedy = CAUSES[main_limit(job)[1]].remedy
    return f"{job.name}: {'; '.join(parts)}. What would help most: {remedy}."


def difference(job: Job, other: Job) -> str | None:
    """Where `job` saves most time against `other`, and where it pays for that; None if it saves nowhere."""
    ours, theirs = cause_seconds(job), cause_seconds(other)
    saved = {cause: theirs[cause] - ours[cause] for cause in CAUSES}
    best, worst = max(saved, key=lambda key: saved[key]), min(saved, key=lambda key: saved[key])
    if saved[best] <= 0:
        return None
    text = f"Against {other.name}, {job.name} saves most in {_change(best, ours, theirs)}"
    if saved[worst] < -_NOTEWORTHY * job.seconds:
        text += f", and pays most in {_change(worst, ours, theirs)}"
    return text + "."


def _change(cause: str, ours: dict[str, float], theirs: dict[str, float]) -> str:
    return f"{CAUSES[cause].name}: {time_text(ours[cause])} instead of {time_text(theirs[cause])}"


def time_text(seconds: float) -> str:
    """`0`, `85 ms`, `8.3 s`, `2 min 05 s`."""
    if seconds == 0:
        return "0"
    return f"{seconds * 1e3:.0f} ms" if seconds < 0.0995 else format_seconds(seconds)
