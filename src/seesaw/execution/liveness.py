"""Signs of life: which ranks have not been heard of for too long, and what they were doing.

A worker sends `Alive` from a thread of its own, so silence means that its process is stopped or stuck, however long a
step may take. Only time in which the control process was listening counts: if it was stopped itself, its workers'
messages wait for it.
"""

from __future__ import annotations

from seesaw.core.errors import WorkerError

BEAT = 1.0
"""Seconds between two signs of life."""
_MOST_PER_LOOK = 2 * BEAT
"""Silence that one look at the messages can add."""


class Liveness:
    """Who has been silent for how long. Times are seconds of the monotonic clock."""

    def __init__(self, ranks: int, timeout: float, now: float) -> None:
        self._silent = [0.0] * ranks
        self._phases = ["startup"] * ranks
        self._timeout, self._looked = timeout, now

    def heard(self, rank: int, phase: str) -> None:
        """A sign of life from `rank`, which is doing `phase`."""
        self._silent[rank] = 0.0
        self._phases[rank] = phase

    def looked(self, now: float) -> None:
        """All messages that had arrived were taken in. Raises `WorkerError` if a rank is taken for lost."""
        passed = min(now - self._looked, _MOST_PER_LOOK)
        self._looked = now
        self._silent = [seconds + passed for seconds in self._silent]
        lost = tuple(rank for rank, seconds in enumerate(self._silent) if seconds > self._timeout)
        if lost:
            first = lost[0]
            raise WorkerError(
                f"{_ranks(lost)} gave no sign of life for {self._timeout:g} s, last during {self._phases[first]}; "
                "stopped, or stuck in its device",
                rank=first,
                phase=self._phases[first],
                lost=lost,
            )


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
