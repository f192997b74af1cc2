"""Latencies of simulated requests that arrive over time, in memory that does not grow with the job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, exp, floor, log

PERCENTILES = (50, 90, 99)
_STEP = log(1.01)
_LEAST = 1e-9
"""Seconds; shorter ones are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Percentiles 50, 90 and 99 in seconds, within half a per cent."""

    ttft: dict[int, float]
    """From a request's arrival to its first token."""
    inter_token: dict[int, float]
    """Between neighbouring tokens, over all pairs of all requests; empty if no request has two tokens."""
    end_to_end: dict[int, float]
    """From a request's arrival to its last token."""


class Histogram:
    """Counts positive values in cells that are each 1 % wide."""

    def __init__(self) -> None:
        self._cells: Counter[int] = Counter()

    def add(self, value: float, count: int = 1) -> None:
        """Count a value so many times."""
        self._cells[floor(log(max(value, _LEAST)) / _STEP)] += count

    def percentiles(self) -> dict[int, float]:
        """The values that so many of 100 do not exceed; empty if nothing was counted."""
        total = self._cells.total()
        if not total:
            return {}
        wanted, found, seen = iter(PERCENTILES), {}, 0
        share = next(wanted)
        for cell, count in sorted(self._cells.items()):
            seen += count
            while share not in found and seen >= ceil(total * share / 100):
                found[share] = 0.0 if cell <= log(_LEAST) / _STEP else exp((cell + 0.5) * _STEP)
                share = next(wanted, share)
        return found


class LatencyMeter:
    """Watches requests by number from arrival to their last token."""

    def __init__(self) -> None:
        self._first, self._between, self._whole = Histogram(), Histogram(), Histogram()
        self._arrived: dict[int, float] = {}
        """Of requests that have not finished."""
        self._latest: dict[int, float] = {}
        """When their latest token came."""

    def arrived(self, request: int, at: float) -> None:
        """A request arrived."""
        self._arrived[request] = at

    def tokens(self, requests: Iterable[int], now: float) -> None:
        """Each of these requests got a token."""
        before: Counter[float] = Counter()
        for request in requests:
            latest = self._latest.get(request)
            if latest is None:
                self._first.add(now - self._arrived[request])
            else:
                before[latest] += 1  # those of one batch had their last token together
            self._latest[request] = now
        for latest, count in before.items():
            self._between.add(now - latest, count)

    def finished(self, request: int, now: float) -> None:
        """A request got its last token."""
        self._whole.add(now - self._arrived.pop(request))
        del self._latest[request]

    def latency(self) -> Latency:
        """Of everything so far."""
        return Latency(
            ttft=self._first.percentiles(),
            inter_token=self._between.percentiles(),
            end_to_end=self._whole.percentiles(),
        )
