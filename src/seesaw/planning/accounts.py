"""Where the time of a simulated job went: every second of every stage, by phase and cause.

A phase is a span of the virtual clock, a book entry an interval of it on one stage. An interval that reaches over the
end of a phase is shared out by time. So the causes of a phase, averaged over the stages, add up to its seconds, and
the phases to the job's.
"""

from __future__ import annotations

from dataclasses import dataclass

CAUSES = (
    "weights",
    "arithmetic",
    "attention",
    "activations",
    "all_reduce",
    "hand_over",
    "overhead",
    "swap",
    "transition",
    "bubble",
    "idle",
)
"""What a stage does, or waits for. The first five and `overhead` are those of `planning.cost.Cost`; then

- `hand_over`: activations are on their way from the stage before, and there is nothing else to do;
- `swap`: nothing to do before a copy between device and host is through;
- `transition`: weights change, and the stage's other ranks have to be through with it as well;
- `bubble`: the stage before it, or a token, is waited for;
- `idle`: everything else, such as another replica that still works, or requests that have not arrived.
"""
ATTENTION, HAND_OVER, SWAP, TRANSITION, BUBBLE, IDLE = (
    CAUSES.index(name) for name in ("attention", "hand_over", "swap", "transition", "bubble", "idle")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """What one phase came to, all its turns together."""

    seconds: float
    """Of virtual time."""
    forwards: int
    """Micro-batches and steps, over all replicas."""
    tokens: int
    """Fed to them."""
    batch: float
    """Sequences that a Forward samples for, on average; 0 without Forwards."""
    causes: dict[str, float]
    """Seconds by cause (all of `CAUSES`), averaged over the stages of all replicas; they add up to `seconds`."""


@dataclass(slots=True)
class _Phase:
    sums: list[float]
    """Seconds by number of the cause, averaged over the stages."""
    forwards: int = 0
    tokens: int = 0
    sampled: int = 0


class Accounts:
    """The book. Intervals may come in any order, but each after the beginning of the phases that it meets."""

    def __init__(self, phases: tuple[str, ...]) -> None:
        """The clock begins with the first of `phases`."""
        self._phases = {name: _Phase([0.0] * len(CAUSES)) for name in phases}
        self._starts, self._names = [0.0], [phases[0]]

    def begin(self, name: str, at: float) -> None:
        """Another phase begins. One that would begin before the latest one begins with it."""
        self._starts.append(max(at, self._starts[-1]))
        self._names.append(name)

    def count(self, name: str, tokens: int, sampled: int) -> None:
        """Count a Forward."""
        phase = self._phases[name]
        phase.forwards += 1
        phase.tokens += tokens
        phase.sampled += sampled

    def within(self, start: float) -> list[float] | None:
        """The sums to which all intervals from `start` on belong, None if a phase begins later than that."""
        return self._phases[self._names[-1]].sums if start >= self._starts[-1] else None

    def book(self, cause: int, start: float, end: float, weight: float) -> None:
        """From `start` to `end`, a stage that is `weight` of all stages had this cause."""
        self.book_all({cause: end - start}, start, end, weight)

    def book_all(self, causes: dict[int, float], start: float, end: float, weight: float) -> None:
        """The same for several causes, whose seconds add up to the interval's."""
        if end <= start:
            return
        until = float("inf")
        for since, name in zip(reversed(self._starts), reversed(self._names), strict=True):
            share = (min(end, until) - max(start, since)) / (end - start)
            if share > 0:
                sums = self._phases[name].sums
                for cause, seconds in causes.items():
                    sums[cause] += share * weight * seconds
            if since <= start:
                return
            until = since

    def report(self, end: float) -> dict[str, PhaseReport]:
        """What was booked until the clock's `end`, by phase."""
        seconds = dict.fromkeys(self._phases, 0.0)
        for i, (start, name) in enumerate(zip(self._starts, self._names, strict=True)):
            following = self._starts[i + 1] if i + 1 < len(self._starts) else end
            seconds[name] += max(0.0, min(following, end) - start)
        return {
            name: PhaseReport(
                seconds=seconds[name],
                forwards=phase.forwards,
                tokens=phase.tokens,
                batch=phase.sampled / phase.forwards if phase.forwards else 0.0,
                causes=dict(zip(CAUSES, phase.sums, strict=True)),
            )
            for name, phase in self._phases.items()
        }
