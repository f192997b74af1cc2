"""The protocols of devices: streams, events and uploads.

Whoever orders work by them is right on every device: on a CPU rank the calling thread is the compute stream and a
thread copies; on a GPU both are queues that the host runs ahead of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


class Event(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Block the calling thread until all work before the point is done. Raises what went wrong with it."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Time between two points that have been reached, of the same device."""
        ...


class Stream(Protocol):
    """Work that is done in the order in which it is launched; work of two streams is ordered by `after` alone.

    What fails on a stream ends it: later work is dropped without `notify`, and the exception is raised by every
    later `launch` and by waiting for its events.
    """

    def launch(self, work: Callable[[], object]) -> None:
        """Do `work` behind everything launched so far. Host memory that it reads must stay as it is until then."""
        ...

    def record(self) -> Event:
        """The point behind everything launched so far."""
        ...

    def after(self, event: Event) -> None:
        """Hold back what is launched from here on until `event`; the host does not wait."""
        ...

    def notify(self, call: Callable[[], None]) -> None:
        """Call, on a thread of the device's choice, once everything launched so far is done. Calls keep their order;
        an exception from one counts as the stream's."""
        ...


class Graph(Protocol):
    """Work that was captured: the same kernels on the same memory, to be launched as one."""

    def replay(self) -> None:
        """Launch it on `compute`, behind everything launched there so far; the host does not wait."""
        ...


class GraphPool(Protocol):
    """Captures work of the compute stream. What it computes on the way lies in memory that all graphs of the pool
    share, so a replay leaves of another one's nothing but what that wrote to memory from outside.

    A graph holds addresses and no tensors: whoever captures keeps all memory from outside as it is for as long as the
    graph lives, and drops graphs and pool only when no replay is under way.
    """

    @property
    def bytes(self) -> int:
        """Of the shared memory."""
        ...

    def capture(self, work: Callable[[], object]) -> Graph:
        """A graph of `work`, which is called twice: it is done once, to compile and to load what it needs, and then
        captured without being done. Waits for the device.

        `work` neither waits for the device nor asks it for anything, and uses no stream but the current one. What
        fails when it is done is raised as it is; `CaptureError` if it cannot be captured.
        """
        ...


class CaptureError(Exception):
    """Work cannot be captured, though it can be done. The message is what the device's library said."""


class Device(Protocol):
    """One rank's device. Made after forking, by the thread that computes."""

    @property
    def name(self) -> str:
        """Such as `cpu` or `cuda:0`: what attention and operators are chosen by."""
        ...

    @property
    def torch(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def runs_behind(self) -> bool:
        """Whether the host runs ahead of `compute`, so that whoever asks for a result waits for all before it."""
        ...

    @property
    def compute(self) -> Stream:
        """What the thread that made the device computes on."""
        ...

    @property
    def to_host(self) -> Stream:
        """For copies of KV to the host buffer."""
        ...

    @property
    def to_device(self) -> Stream:
        """For copies of KV from there; may be the same stream."""
        ...

    @property
    def weights(self) -> Stream:
        """For all that writes weights: copies from the host store, and within the device. `compute` itself where
        nothing runs beside it."""
        ...

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays as tensors on the device, for work on `compute` from here on. The host does not wait, and the
        arrays must not change any more."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in host memory, whole when `compute` has done what was launched so far."""
        ...

    def graph_pool(self) -> GraphPool | None:
        """A new one; None where launching costs nothing that a graph could save."""
        ...

    def close(self) -> None:
        """Finish everything launched and end all threads; raises an error that nobody has seen. Idempotent."""
        ...
