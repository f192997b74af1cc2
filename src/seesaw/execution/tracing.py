"""What a rank tells of its doings while a trace is written: an event for each Forward, copy, transition and wait.

Events are gathered and sent to the control process in batches, beside what the rank reports anyway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from seesaw.core.actions import Forward
from seesaw.core.events import COMPUTE, COPIES, Event
from seesaw.execution.messages import Events
from seesaw.execution.profiling import Timed
from seesaw.transport.base import Members, PartialSums, has_partial_sums

_T = TypeVar("_T")

_MOST = 200
"""Events of a message."""
_SECONDS = 0.25
"""After which events are sent although they are few."""
_SHORT = 20e-6
"""Seconds below which a wait has no event of its own."""


class RankTrace:
    """Gathers the events of one rank. `copied` is called by the copy thread, everything else by the main thread."""

    def __init__(self, rank: int, report: Callable[[Events], None]) -> None:
        """`report` sends a message and may be called from either thread."""
        self._rank, self._report = rank, report
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._sent = time.monotonic()
        self._exchanging = 0.0
        """Seconds of the present Forward that went to collectives."""

    @contextmanager
    def forward(self, forward: Forward) -> Iterator[None]:
        """The event of a Forward, which is run inside."""
        self._exchanging = 0.0
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        args: dict[str, int | float | str] = {
            "id": forward.id,
            "replica": forward.replica,
            "sequences": len(forward.slots),
        }
        if self._exchanging:
            args["collectives_ms"] = round(self._exchanging * 1e3, 3)
        tokens = sum(forward.counts)
        self._add(Event(kind(forward), self._rank, COMPUTE, started, seconds, tokens=tokens, args=args))

    def transition(self, started: float, ended: float, target: str, fetched: int, copied: int) -> None:
        """The event of a transition: bytes fetched from the host store, and copied on the device."""
        args: dict[str, int | float | str] = {"target": target, "copied_bytes": copied}
        self._add(
            Event("transition", self._rank, COMPUTE, started, ended - started, bytes=fetched, args=args)
        )

    def copied(self, name: str, moved: int, seconds: float) -> None:
        """The event of a copy that has just ended."""
        self._add(Event(name, self._rank, COPIES, time.monotonic() - seconds, seconds, bytes=moved))

    def watch(self, transport: _T) -> _T:
        """`transport`, with an event for each wait for another stage, and the time of collectives counted."""
        methods = {name: self._counted(transport, name) for name in ("all_reduce", "gather", "broadcast")}
        if has_partial_sums(transport):
            methods["all_reduce_in_parts"] = self._counted_in_parts(transport)
        return cast(_T, Timed(transport, methods | {"receive": self._received(transport)}))

    def book(self, label: str, calls: int, seconds: float) -> None:
        """Calls of a function that were timed elsewhere, in the Forward under way."""
        if label.startswith("all_reduce"):
            self._exchanging += seconds

    def flush(self) -> None:
        """Send what has been gathered."""
        with self._lock:
            events, self._events = self._events, []
            self._sent = time.monotonic()
        if events:
            self._report(Events(events))

    def wait(self, arrived: Callable[[float], object]) -> None:
        """Send what has been gathered, unless a message arrives at once; `arrived` waits so many seconds for one."""
        while self._events and not arrived(_SECONDS):
            self.flush()

    def _add(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            due = len(self._events) >= _MOST or event.start + event.seconds - self._sent > _SECONDS
        if due:
            self.flush()

    def _counted(self, transport: object, name: str) -> Callable[..., Any]:
        method = getattr(transport, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            result = method(*args, **kwargs)
            self._exchanging += time.monotonic() - started
            return result

        return call

    def _counted_in_parts(self, transport: PartialSums) -> Callable[..., Any]:
        """Without the time in which the parts are computed."""
        method = transport.all_reduce_in_parts

        def call(x: Any, counts: Sequence[int], compute: Callable[[int], object], members: Members) -> Any:
            computing = 0.0

            def timed(part: int) -> None:
                nonlocal computing
                started = time.monotonic()
                compute(part)
                computing += time.monotonic() - started

            started = time.monotonic()
            result = method(x, counts, timed, members)
            self._exchanging += time.monotonic() - started - computing
            return result

        return call

    def _received(self, transport: Any) -> Callable[..., Any]:
        method = transport.receive

        def receive(x: Any, rank: int, channel: int) -> Any:
            started = time.monotonic()
            result = method(x, rank, channel)
            seconds = time.monotonic() - started
            if seconds >= _SHORT:
                name = "wait for tokens" if channel else "wait for stage"
                self._add(Event(name, self._rank, COMPUTE, started, seconds, args={"from": rank}))
            return result

        return receive


def kind(forward: Forward) -> str:
    """`prefill`, `decode`, or `mixed` where a batch holds both."""
    if forward.decodes:
        return "decode"
    if forward.write_through:
        return "prefill"
    steps = any(start and count == 1 for start, count in zip(forward.starts, forward.counts, strict=True))
    return "mixed" if steps else "prefill"
