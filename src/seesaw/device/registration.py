"""Host memory that a GPU reaches itself: its pages registered with CUDA, as far as the driver lets them be."""

from __future__ import annotations

import contextlib
import logging
import mmap
import resource
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.units import format_bytes

logger = logging.getLogger(__name__)

SLICE_BYTES = 1 << 30
"""What is registered at a time where a driver refuses the whole."""
_PORTABLE, _MAPPED, _READ_ONLY = 1, 2, 8  # cudaHostRegister…


class Fence(Protocol):
    """A point in the work of the device's current stream."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...


class Runtime(Protocol):
    """What a `Registration` needs of the device's runtime."""

    def register(self, address: int, size: int, read_only: bool) -> int:
        """Register whole pages for every device of the process; 0, or the error of the driver."""
        ...

    def unregister(self, address: int) -> int:
        """Undo `register` at the same address; 0, or the error."""
        ...

    def explain(self, error: int) -> str:
        """An error in words."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that the device was given."""
        ...

    def pinned(self, size: int) -> Tensor:
        """So many bytes of new pinned memory, uint8. Raises `RuntimeError` if there are none."""
        ...

    def record(self) -> Fence:
        """A fence behind what the current stream holds."""
        ...


class CudaRuntime:
    """See `Runtime`. Needs the rank's device to be current."""

    def register(self, address: int, size: int, read_only: bool) -> int:
        """See `Runtime.register`."""
        flags = _PORTABLE | _MAPPED | (_READ_ONLY if read_only else 0)
        error = int(_cudart().cudaHostRegister(address, size, flags))
        if error:
            # CUDA would report the error once more, as that of the next kernel: this is the next kernel
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
        return error

    def unregister(self, address: int) -> int:
        """See `Runtime.unregister`."""
        return int(_cudart().cudaHostUnregister(address))

    def explain(self, error: int) -> str:
        """See `Runtime.explain`."""
        cudart = _cudart()
        return str(cudart.cudaGetErrorString(cudart.cudaError(error)))

    def synchronize(self) -> None:
        """See `Runtime.synchronize`."""
        torch.cuda.synchronize()

    def pinned(self, size: int) -> Tensor:
        """See `Runtime.pinned`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def record(self) -> Fence:
        """See `Runtime.record`."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class Registration:
    """Registers mappings, such as the files of a checkpoint, in this process, until `close`.

    All their pages become resident and stay so. If the driver refuses a mapping as a whole it is asked for
    slices; if it refuses those, one warning says how much is refused and what helps, and neither that mapping nor
    those behind it are registered.
    """

    def __init__(
        self,
        mappings: Sequence[Tensor],
        name: str,
        *,
        remedy: str,
        read_only: bool = False,
        runtime: Runtime | None = None,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        """`mappings` are contiguous CPU tensors; none of their pages is registered yet, or shared by two of them.

        `name` is what users call them, `remedy` what helps where they are too large. Memory that is mapped read-only
        must be registered as such.
        """
        assert slice_bytes > 0 and slice_bytes % mmap.PAGESIZE == 0, slice_bytes
        self.runtime = runtime or CudaRuntime()
        self._name, self._remedy, self._read_only = name, remedy, read_only
        self._mappings = tuple(mappings)
        self._spans: list[tuple[int, int]] = []
        self._reached: list[tuple[int, int]] = []
        """First address and that behind the last of each mapping that is registered whole."""
        self._closed = False
        extents = [_pages(mapping) for mapping in self._mappings]
        self._whole = True
        for start, stop in extents:
            error = self._register(start, stop, slice_bytes)
            if error:
                self._whole = False
                logger.warning("%s", self._refusal(extents, error))
                break
            self._reached.append((start, stop))

    @property
    def registered(self) -> bool:
        """Whether the device reaches all of the memory itself."""
        return self._whole and not self._closed

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) of each registered slice: a copy by the driver may not cross from one to the next."""
        return tuple(self._spans)

    def reaches(self, memory: Tensor) -> bool:
        """Whether kernels can read `memory`, a tensor in one of the mappings."""
        at = memory.data_ptr()
        return not self._closed and any(start <= at < stop for start, stop in self._reached)

    def in_one_span(self, memory: Tensor) -> bool:
        """Whether the driver can copy `memory`, a contiguous tensor, at once."""
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        return any(address <= start and stop <= address + size for address, size in self._spans)

    def pinned(self, size: int) -> Tensor:
        """So many bytes of new pinned memory, uint8. Raises `MemoryBudgetError` if there are none."""
        try:
            return self.runtime.pinned(size)
        except RuntimeError as error:
            raise MemoryBudgetError(
                f"{self._name}: neither can it be registered with CUDA, nor are there {format_bytes(size)} of pinned "
                f"memory to copy through: {str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Wait for the device, then give the pages back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._spans:
            self.runtime.synchronize()
            self._unregister(down_to=0)
        self._mappings = ()

    def _register(self, start: int, stop: int, slice_bytes: int) -> int:
        """Register the pages whole, or else in slices; 0, or the error, with none of them registered."""
        error = self._register_slices(start, stop, stop - start)
        if error and slice_bytes < stop - start:
            error = self._register_slices(start, stop, slice_bytes)
        return error

    def _register_slices(self, start: int, stop: int, size: int) -> int:
        before = len(self._spans)
        for address in range(start, stop, max(size, 1)):
            length = min(size, stop - address)
            error = self.runtime.register(address, length, self._read_only)
            if error:
                self._unregister(down_to=before)
                return error
            self._spans.append((address, length))
        return 0

    def _unregister(self, down_to: int) -> None:
        while len(self._spans) > down_to:
            address, size = self._spans.pop()
            error = self.runtime.unregister(address)
            if error:
                logger.warning(
                    "%s: %s of it could not be unregistered: %s (CUDA error %d)",
                    self._name,
                    format_bytes(size),
                    self.runtime.explain(error),
                    error,
                )

    def _refusal(self, extents: list[tuple[int, int]], error: int) -> str:
        whole = sum(stop - start for start, stop in extents)
        refused = whole - sum(size for _, size in self._spans)
        size = format_bytes(refused) + (f" of {format_bytes(whole)}" if refused < whole else "")
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        remedy = self._remedy
        if limit != resource.RLIM_INFINITY:
            remedy = (
                f"raise the limit of locked memory, {format_bytes(limit)} now (`ulimit -l unlimited`, in a "
                f"container `--ulimit memlock=-1`), or {remedy}"
            )
        return (
            f"{self._name}: {size} cannot be registered with CUDA ({self.runtime.explain(error)}, "
            f"error {error}), so copies pass through a staging buffer, at half the speed or less; {remedy}"
        )


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _pages(memory: Tensor) -> tuple[int, int]:
    """The first address and that behind the last of the pages that hold `memory`."""
    assert memory.is_cpu and memory.is_contiguous(), (memory.device, memory.stride())
    if not memory.numel():
        return 0, 0
    page = mmap.PAGESIZE
    start = memory.data_ptr()
    return start // page * page, -(-(start + memory.nbytes) // page) * page
