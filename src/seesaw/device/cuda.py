"""CUDA ranks: streams and events of a GPU, and a thread per stream that tells when something is done.

The calls of `torch.cuda` that order work are taken through `CudaApi`, so that a recording stand-in can take their
place and prove the order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from queue import SimpleQueue
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from seesaw.device.base import Array, CaptureError, Event

_ALIGNMENT = 16
"""Bytes; of each array in an upload, so that kernels may read vectors."""


class CudaApi(Protocol):
    """What of `torch.cuda` is used; see its documentation."""

    Stream: Callable[..., Any]
    Event: Callable[..., Any]
    CUDAGraph: Callable[..., Any]
    graph: Callable[..., AbstractContextManager[Any]]

    def graph_pool_handle(self) -> Any: ...
    def memory_reserved(self, device: torch.device) -> int: ...
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...
    def current_stream(self, device: torch.device) -> Any: ...
    def set_device(self, device: torch.device) -> None: ...


class CudaEvent:
    """See `Event`."""

    __slots__ = ("_stream", "native")

    def __init__(self, stream: CudaStream, native: Any) -> None:
        self._stream, self.native = stream, native

    def wait(self) -> None:
        """See `Event.wait`."""
        self.native.synchronize()
        self._stream.check()

    def seconds_since(self, earlier: Event) -> float:
        """See `Event.seconds_since`."""
        return float(_native(earlier).elapsed_time(self.native)) / 1e3


class CudaStream:
    """See `Stream`. Launching is done by one thread; another waits for events and calls who is to be told."""

    def __init__(self, api: CudaApi, native: Any, name: str) -> None:
        self._api, self.native = api, native
        self._calls: SimpleQueue[tuple[CudaEvent, Callable[[], None]] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._seen = False
        self._thread = threading.Thread(target=self._tell, name=f"seesaw-{name}", daemon=True)
        self._thread.start()

    def launch(self, work: Callable[[], object]) -> None:
        """See `Stream.launch`; the kernels and copies that `work` launches are queued when it returns."""
        self.check()
        with self._api.stream(self.native):
            work()

    def record(self) -> CudaEvent:
        """See `Stream.record`."""
        event = self._api.Event(enable_timing=True, blocking=True)
        event.record(self.native)
        return CudaEvent(self, event)

    def after(self, event: Event) -> None:
        """See `Stream.after`."""
        self.native.wait_event(_native(event))

    def notify(self, call: Callable[[], None]) -> None:
        """See `Stream.notify`."""
        self.check()
        self._calls.put((self.record(), call))

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            self._seen = True
            raise self._error

    def close(self) -> None:
        """Wait for all work and end the thread; raises an error that nobody has seen. May be called twice."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join()
            self.native.synchronize()
        if not self._seen:
            self.check()

    def _tell(self) -> None:
        while (item := self._calls.get()) is not None:
            if self._error is not None:
                continue
            event, call = item
            try:
                event.native.synchronize()
                call()
            except BaseException as error:  # whatever it is, the launching thread must learn of it
                self._error = error


class CudaDevice:
    """See `Device`. Copies in each direction have a stream of their own, since the link carries both at once."""

    def __init__(
        self, name: str, *, api: CudaApi | None = None, torch_device: torch.device | None = None
    ) -> None:
        """`name` such as `cuda:0`; `api` and `torch_device` stand in for the GPU in tests."""
        self.name = name
        self.torch = torch_device or torch.device(name)
        self.runs_behind = True
        self._api = api or cast(CudaApi, torch.cuda)
        self._api.set_device(self.torch)
        self.compute = CudaStream(self._api, self._api.current_stream(self.torch), "compute")
        self.to_host = CudaStream(self._api, self._api.Stream(self.torch), "to-host")
        self.to_device = CudaStream(self._api, self._api.Stream(self.torch), "to-device")
        self.weights = CudaStream(self._api, self._api.Stream(self.torch), "weights")
        self._uploads = _Uploads(self.compute, self.torch)
        self._capturing: Any = None

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See `Device.upload`."""
        return self._uploads(arrays)

    def download(self, tensor: Tensor) -> Tensor:
        """See `Device.download`."""
        copy = (
            _pinned(tensor.numel() * tensor.element_size(), self.torch).view(tensor.dtype).view(tensor.shape)
        )
        return copy.copy_(tensor, non_blocking=True)

    def graph_pool(self) -> CudaGraphPool:
        """See `Device.graph_pool`. All capture on one stream, for which libraries keep workspaces."""
        if self._capturing is None:
            self._capturing = self._api.Stream(self.torch)
        return CudaGraphPool(self._api, self.compute, self._capturing, self.torch)

    def close(self) -> None:
        """See `Device.close`."""
        with ExitStack() as streams:  # each of them is closed, whatever another one raises
            for stream in (self.compute, self.to_host, self.to_device, self.weights):
                streams.callback(stream.close)


class CudaGraph:
    """See `Graph`."""

    __slots__ = ("_native", "_stream")

    def __init__(self, stream: CudaStream, native: Any) -> None:
        self._stream, self._native = stream, native

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._stream.launch(self._native.replay)


class CudaGraphPool:
    """See `GraphPool`. Its memory goes with the last of its graphs."""

    def __init__(self, api: CudaApi, compute: CudaStream, native: Any, device: torch.device) -> None:
        """Captures on the stream `native`, for `compute`."""
        self._api, self._compute, self._native, self._device = api, compute, native, device
        self._handle = api.graph_pool_handle()
        self.bytes = 0

    def capture(self, work: Callable[[], object]) -> CudaGraph:
        """See `GraphPool.capture`.

        Work is done on the stream that captures, behind all that was launched, since matrix libraries make their
        workspace for each stream at first use. Other threads go on waiting for events meanwhile: hence
        `thread_local`, by which their calls do not spoil a capture.
        """
        graph = self._api.CUDAGraph()
        self._native.wait_event(self._compute.record().native)
        with self._api.stream(
            self._native
        ):  # whatever a capture that fails leaves, the stream before is back
            work()
            try:
                with self._api.graph(
                    graph, pool=self._handle, stream=self._native, capture_error_mode="thread_local"
                ):
                    before = self._api.memory_reserved(self._device)
                    work()
            except RuntimeError as error:  # torch's own errors are all of this kind
                raise CaptureError(_first_cause(error)) from error
            self.bytes += self._api.memory_reserved(self._device) - before
            done = self._api.Event(enable_timing=False, blocking=True)
            done.record(self._native)
        self._compute.native.wait_event(done)
        return CudaGraph(self._compute, graph)


def _first_cause(error: BaseException) -> str:
    """In one line. Where a capture fails, torch raises again at its end, with less to say."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Uploads:
    """Arrays go to the device through pinned memory, all of one call in one copy.

    A piece of pinned memory is filled again only when the copy out of it is done: with as many pieces as the uploads
    of all Forwards that are under way at once (three of each: inputs, parameters of sampling, slots of the tokens),
    nobody ever waits for that.
    """

    def __init__(self, stream: CudaStream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._pieces: deque[tuple[Tensor, CudaEvent]] = deque()

    def __call__(self, arrays: Sequence[Array]) -> list[Tensor]:
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        piece = self._take(size)
        flat = piece.numpy()
        for start, array in zip(starts, arrays, strict=True):
            flat[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        whole = torch.empty(size, dtype=torch.uint8, device=self._device)
        whole.copy_(piece[:size], non_blocking=True)
        self._pieces.append((piece, self._stream.record()))
        return [
            whole[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _take(self, size: int) -> Tensor:
        """Pinned memory of at least `size` bytes that no copy reads."""
        if len(self._pieces) >= _PIECES:
            piece, read = self._pieces.popleft()
            read.wait()
            if len(piece) >= size:
                return piece
        return _pinned(max(_LEAST, 1 << (size - 1).bit_length()), self._device)


_PIECES = 32
_LEAST = 1 << 16
"""Bytes of a piece of pinned memory; larger ones are powers of two."""


def _pinned(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _native(event: Event) -> Any:
    assert isinstance(event, CudaEvent), "events of one device"
    return event.native
