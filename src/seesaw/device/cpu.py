"""CPU ranks: the thread that launches work does it; copies are done by another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from seesaw.device.base import Array, Event


class _Past:
    """A point that was reached when it was made."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        """See `Event.wait`."""

    def reached(self) -> float:
        """When."""
        return self._at

    def seconds_since(self, earlier: Event) -> float:
        """See `Event.seconds_since`."""
        return self._at - _reached(earlier)


class CallerStream:
    """The calling thread: work is done when it is launched."""

    def launch(self, work: Callable[[], object]) -> None:
        """See `Stream.launch`."""
        work()

    def record(self) -> Event:
        """See `Stream.record`."""
        return _Past()

    def after(self, event: Event) -> None:
        """See `Stream.after`."""
        event.wait()

    def notify(self, call: Callable[[], None]) -> None:
        """See `Stream.notify`."""
        call()


class _Point:
    """A point in the work of a `ThreadStream`."""

    __slots__ = ("_future", "_stream")

    def __init__(self, stream: ThreadStream, future: Future[float]) -> None:
        self._stream, self._future = stream, future

    def wait(self) -> None:
        """See `Event.wait`."""
        self._future.result()
        self._stream.check()

    def reached(self) -> float:
        """When."""
        return self._future.result()

    def seconds_since(self, earlier: Event) -> float:
        """See `Event.seconds_since`."""
        return self.reached() - _reached(earlier)


class ThreadStream:
    """A thread that does one piece of work after another.

    A process that exits without `close` finishes what is queued and leaves. Make it after forking: threads stay
    behind.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"seesaw-{name}")
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._seen = False
        self._closed = False

    def launch(self, work: Callable[[], object]) -> None:
        """See `Stream.launch`."""
        self.check()
        self._queue(work)

    def record(self) -> Event:
        """See `Stream.record`."""
        return _Point(self, self._queue(None))

    def after(self, event: Event) -> None:
        """See `Stream.after`."""
        if not isinstance(event, _Past):
            self.launch(event.wait)

    def notify(self, call: Callable[[], None]) -> None:
        """See `Stream.notify`."""
        self.launch(call)

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            self._seen = True
            raise self._error

    def close(self) -> None:
        """Finish what is queued and end the thread; raises an error that nobody has seen. May be called twice."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True)
        if not self._seen:
            self.check()

    def _queue(self, work: Callable[[], object] | None) -> Future[float]:
        assert os.getpid() == self._pid, "a stream does not survive a fork"
        with self._lock:
            assert not self._closed, "the stream is closed"
            return self._pool.submit(self._run, work)

    def _run(self, work: Callable[[], object] | None) -> float:
        """Do it; returns the time at its end."""
        if self._error is None and work is not None:
            try:
                work()
            except BaseException as error:  # whatever it is, the launching thread must learn of it
                self._error = error
        return time.perf_counter()


class CpuDevice:
    """See `Device`. One thread copies in both directions."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.torch = torch.device("cpu")
        self.runs_behind = False
        self.compute = self.weights = CallerStream()
        self.to_host = self.to_device = ThreadStream("copies")

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See `Device.upload`; the tensors share the arrays' memory."""
        return [torch.from_numpy(array) for array in arrays]

    def download(self, tensor: Tensor) -> Tensor:
        """See `Device.download`; it is `tensor` itself."""
        return tensor

    def graph_pool(self) -> None:
        """See `Device.graph_pool`; work is done where it is launched, and there is nothing to save."""

    def close(self) -> None:
        """See `Device.close`."""
        self.to_host.close()


def _reached(event: Event) -> float:
    assert isinstance(event, _Past | _Point), "events of one device"
    return event.reached()
