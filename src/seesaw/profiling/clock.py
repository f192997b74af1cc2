"""Seconds of a call: the median of several windows, or their lower quartile.

On CPU ranks of one thread they are seconds of the processor, which other processes on the same core do not enter: the
median counts. Where ranks wait for each other, for a quota, for threads or for an accelerator, they are those of the
clock, and the lower quartile counts.

What ranks measure at the same time must not be measured while one of them has not begun, or has ended already. So
each calls from the start on, takes windows that lie between two moments of the clock that all processes share, and
goes on a little longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

from seesaw.core.devices import kind_of

Call = Callable[[], object]
_MEETINGS = 8
"""In a row at most, before ranks agree on whether to go on."""
_TAIL = 0.002
"""Seconds that a rank goes on for the others, whose calls may be late by a little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When to measure, in seconds of `time.monotonic`, and how long a window is at least."""

    start: float
    end: float
    window: float
    by_clock: bool
    """Whether the calling thread's processor time is not all there is, on CPU ranks."""


def seconds_per_call(calls: Sequence[Call], device: str, span: Span, before: Call | None = None) -> float:
    """Of `calls` taken in turn: those of one operator on operands of their own, so that none is found in caches.

    `before` is called before each of them, out of the count: an operator of the engine comes after others, which
    have driven its code and its data from the caches. Measures for as long as `span` says. A call that takes
    longer than that is made until the span begins, and once at least.
    """
    turn, once = cycle(calls), float("inf")
    timed = _timer(device, span, before)
    while once == float("inf") or time.monotonic() < span.start:
        once = min(once, timed(turn, 1))
    if once > span.end - span.start:
        return once
    count = 1 if before else max(1, round(span.window / max(once, 1e-7)))
    found: list[float] = []
    while not found or time.monotonic() < span.end:
        found.append(timed(turn, count) / count)
    while time.monotonic() < span.end + _TAIL:
        timed(turn, 1)
    return _quantile(found, by_clock=span.by_clock or kind_of(device).runs_behind)


def told(call: Callable[[], float], span: Span) -> float:
    """Of a call that times itself."""
    found: list[float] = []
    call()
    while not found or time.monotonic() < span.end:
        found.append(call())
    return _quantile(found, by_clock=span.by_clock)


def own_clock(by_clock: bool) -> Callable[[], float]:
    """What tells the seconds of a CPU rank."""
    return time.perf_counter if by_clock else time.thread_time


def together(
    call: Call,
    agree: Callable[[int], int],
    span: Span,
    before: Call | None = None,
    settle: Call | None = None,
) -> float:
    """Of a call that several ranks make in step. `agree` returns one rank's number on all of them, and lets them
    begin at about the same time; `before` is called before each, out of the count. `settle` waits for a device that
    runs behind, after as many calls in a row as fill a window."""

    def several(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        if settle is not None:
            settle()
        return time.perf_counter() - started

    several(1)
    once = max(several(1), 1e-7)
    count = agree(16 if before else max(1, min(1000, round(span.window / once))))
    found: list[float] = []
    while agree(not found or time.monotonic() < span.end):
        if before is None:
            found.append(several(count) / count)
        else:
            found += [_after(before, call) for _ in range(count)]
    return _quantile(found, by_clock=True)


def waited(work: Sequence[Call], meet: Call, agree: Callable[[int], int], span: Span) -> float:
    """The time that ranks wait where they `meet`, over that of their `work`, which is taken in turn before each.

    It is what the slowest of them takes longer, time by time. A mean, since all of it adds up in a job.
    """
    turn, working, waiting = cycle(work), 0.0, 0.0
    started = time.perf_counter()
    next(turn)()
    in_a_row = agree(max(1, min(_MEETINGS, round((span.end - span.start) / (time.perf_counter() - started)))))
    while agree(not working or time.monotonic() < span.end):
        for _ in range(in_a_row):
            started = time.perf_counter()
            next(turn)()
            met = time.perf_counter()
            meet()
            working += met - started
            waiting += time.perf_counter() - met
    return waiting / working


def _after(before: Call, call: Call) -> float:
    before()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _quantile(values: Sequence[float], *, by_clock: bool) -> float:
    return sorted(values)[(len(values) - 1) // (4 if by_clock else 2)]


def _timer(device: str, span: Span, before: Call | None) -> Callable[[cycle[Call], int], float]:
    """What measures the seconds of so many calls, or of one that comes after `before`."""
    measure = partial(_by_clock, own_clock(span.by_clock))
    if kind_of(device).runs_behind:
        measure = partial(_by_events, torch.device(device))

    def timed(turn: cycle[Call], count: int) -> float:
        if before is not None:
            before()
        return measure(turn, count)

    return timed


def _by_clock(clock: Callable[[], float], turn: cycle[Call], count: int) -> float:
    started = clock()
    for _ in range(count):
        next(turn)()
    return clock() - started


def _by_events(device: torch.device, turn: cycle[Call], count: int) -> float:
    start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
    start.record()
    for _ in range(count):
        next(turn)()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
