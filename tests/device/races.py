"""A stand-in for `torch.cuda` that proves the order of work: streams and events as vector clocks.

All work is done when it is launched, on CPU tensors, so results are those of a run without mistakes in its order. But
each access to memory that is watched is checked: of two accesses to the same bytes, one of them a write, one must
have been ordered before the other by a stream, an event, a wait of the host or a message; else a GPU may do them in
either order, or at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from tests.device.captures import FakeGraph, capture

_MOST_ACTORS = 64
Clock = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]


@dataclass
class Actor:
    """A stream or a thread of the host: what it does, it does in order."""

    number: int
    name: str
    clock: Clock = field(default_factory=lambda: np.zeros(_MOST_ACTORS, dtype=np.int64))
    """Of every actor, up to which of its steps all comes before this one's next."""


class FakeStream:
    """A `torch.cuda.Stream`."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.actor = cuda, cuda.actor(name)

    def wait_event(self, event: FakeEvent) -> None:
        """What is launched from here on comes behind `event`."""
        with self.cuda.lock:
            np.maximum(self.actor.clock, event.clock, out=self.actor.clock)

    def synchronize(self) -> None:
        """The host waits for all of it."""
        self.cuda.join(self.actor.clock)


class FakeEvent:
    """A `torch.cuda.Event`."""

    def __init__(self, cuda: FakeCuda, **options: bool) -> None:
        assert set(options) <= {"enable_timing", "blocking"}
        self._cuda = cuda
        self.clock = np.zeros(_MOST_ACTORS, dtype=np.int64)

    def record(self, stream: FakeStream) -> None:
        """Behind what the stream has, and what the host has seen."""
        self._cuda.launched(stream.actor)
        self.clock = stream.actor.clock.copy()

    def synchronize(self) -> None:
        """The host waits."""
        self._cuda.join(self.clock)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds. Who asks must know that both have been reached."""
        if not (self._cuda.has_seen(self.clock) and self._cuda.has_seen(end.clock)):
            self._cuda.races.add("the time between events that may not have been reached")
        return 1.0


class Memory:
    """Bytes that are watched, in rows of `row` bytes from the address `start`."""

    def __init__(self, cuda: FakeCuda, name: str, tensor: torch.Tensor, row: int) -> None:
        self._cuda, self.name, self._start, self._row = cuda, name, tensor.data_ptr(), row
        count = -(-tensor.numel() * tensor.element_size() // row)
        self._writer = np.zeros(count, dtype=np.int64)
        self._written = np.zeros(count, dtype=np.int64)
        self._read = np.zeros((_MOST_ACTORS, count), dtype=np.int64)

    def rows(self, part: torch.Tensor) -> Rows:
        """Those that a tensor in this memory touches; its last dimension is contiguous, and whole rows."""
        return self.rows_at(part, part.data_ptr() - self._start)

    def rows_at(self, part: torch.Tensor, start: int) -> Rows:
        """The same for a tensor whose first byte is byte `start`, wherever this process has it."""
        shape = part.shape[:-1]
        offsets = np.full(shape, start, dtype=np.int64)
        for axis, (extent, stride) in enumerate(zip(shape, part.stride(), strict=False)):
            places = np.arange(extent) * stride * part.element_size()
            offsets += places.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        wide = part.shape[-1] * part.element_size() // self._row
        return (offsets.reshape(-1, 1) // self._row + np.arange(wide)).reshape(-1)

    def rows_from(self, address: int, offsets: Rows) -> Rows:
        """Rows at so many bytes from `address`."""
        return (address - self._start + offsets) // self._row

    def touch(self, rows: Rows, *, write: bool, what: str, by: Actor | None = None) -> None:
        """The actor at hand (or another) reads or writes `rows`."""
        with self._cuda.lock:
            actor = by or self._cuda.acting()
            self._cuda.launched(actor)
            bad = self._written[rows] > actor.clock[self._writer[rows]]
            against = set(self._writer[rows][bad].tolist())
            if write:
                late = self._read[:, rows] > actor.clock[:, None]
                against |= set(np.nonzero(late.any(axis=1))[0].tolist())
            against.discard(actor.number)
            for other in against:
                self._cuda.races.add(
                    f"{what} by {actor.name} against {self._cuda.actors[other].name}: {self.name}"
                )
            if write:
                self._writer[rows], self._written[rows] = actor.number, actor.clock[actor.number]
            else:
                self._read[actor.number, rows] = actor.clock[actor.number]

    def touch_all(self, *, write: bool, what: str) -> None:
        """All of it."""
        self.touch(np.arange(len(self._writer)), write=write, what=what)


class FakeCuda:
    """See `seesaw.device.cuda.CudaApi`. One for all ranks of a test."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.actors: list[Actor] = []
        self.races: set[str] = set()
        """What was not ordered, once for each pair of actors."""
        self.replays: list[int] = []
        """Numbers of graphs, as often as they were launched."""
        self._local = threading.local()

    # ---- what is used of torch.cuda -----------------------------------------------------------------------

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802  torch's name
        """A new stream of the rank whose thread asks."""
        return FakeStream(self, f"copies {len(self.actors)} of {self._host().name}")

    def Event(self, **options: bool) -> FakeEvent:  # noqa: N802  torch's name
        """A new event."""
        return FakeEvent(self, **options)

    @contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        """What this thread launches goes there."""
        before, self._local.stream = getattr(self._local, "stream", None), stream
        try:
            yield
        finally:
            self._local.stream = before

    def current_stream(self, device: torch.device) -> FakeStream:
        """Of this thread, its own."""
        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = FakeStream(self, f"computation of {self._host().name}")
        assert isinstance(stream, FakeStream)
        return stream

    def set_device(self, device: torch.device) -> None:
        """Each thread has one."""

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802  torch's name
        """A new graph."""
        return FakeGraph(self)

    def graph_pool_handle(self) -> WeakSet[FakeGraph]:
        """A new pool."""
        return WeakSet()

    def graph(
        self, graph: FakeGraph, *, pool: WeakSet[FakeGraph], stream: FakeStream, capture_error_mode: str
    ) -> AbstractContextManager[None]:
        """See `captures`; torch waits for the whole device first."""
        assert capture_error_mode == "thread_local"  # others would make of a wait in another thread an error
        stream.synchronize()
        return capture(self, graph, pool, stream)

    def memory_reserved(self, device: torch.device) -> int:
        """Of a GPU."""
        return 0

    # ---- kernels that are none of torch's operators -------------------------------------------------------

    def kernel(self, run: Callable[[], object]) -> None:
        """Launch it; a captured one runs at replays alone, on what its tensors hold then."""
        graph = getattr(self._local, "recorded", None)
        if graph is None:
            run()
        else:
            graph.calls.append(run)

    def capturing(self) -> bool:
        """Whether this thread is."""
        return getattr(self._local, "recorded", None) is not None

    @contextmanager
    def recording(self, graph: FakeGraph) -> Iterator[None]:
        """What this thread launches is captured."""
        self._local.recorded = graph
        try:
            yield
        finally:
            self._local.recorded = None

    # ---- clocks -------------------------------------------------------------------------------------------

    def actor(self, name: str) -> Actor:
        """A new one."""
        with self.lock:
            self.actors.append(Actor(len(self.actors), name))
            return self.actors[-1]

    def acting(self) -> Actor:
        """The stream to which this thread launches, or the thread."""
        stream: Any = getattr(self._local, "stream", None)
        return self._host() if stream is None else stream.actor

    def launched(self, actor: Actor) -> None:
        """A step of `actor`, behind what this thread has seen."""
        with self.lock:
            np.maximum(actor.clock, self._host().clock, out=actor.clock)
            actor.clock[actor.number] += 1

    def join(self, clock: Clock) -> None:
        """This thread has seen all of `clock`."""
        with self.lock:
            host = self._host().clock
            np.maximum(host, clock, out=host)

    def never(self) -> Clock:
        """The clock of a message that says nothing of the order."""
        return np.zeros(_MOST_ACTORS, dtype=np.int64)

    def has_seen(self, clock: Clock) -> bool:
        """Whether this thread has seen all of `clock`."""
        with self.lock:
            return bool((clock <= self._host().clock).all())

    def seen(self) -> Clock:
        """What this thread has seen, to be sent along with a message."""
        with self.lock:
            host = self._host()
            host.clock[host.number] += 1
            return host.clock.copy()

    def _host(self) -> Actor:
        if not hasattr(self._local, "host"):
            self._local.host = self.actor(threading.current_thread().name)
        host: Actor = self._local.host
        return host
