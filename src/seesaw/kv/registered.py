"""Host memory that the device reaches itself: registered with CUDA, and the way round where that is refused."""

from __future__ import annotations

import contextlib
import logging
import mmap
import resource
from typing import Any, Protocol

import torch
from torch import Tensor

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.units import format_bytes
from seesaw.core.workspace import STAGING_BYTES
from seesaw.kv.staging import Fence, StagedCopies
from seesaw.kv.transfers import SlabCopy, copy_slabs

logger = logging.getLogger(__name__)

SLICE_BYTES = 1 << 30
"""What is registered at a time where a driver refuses the whole."""
_PORTABLE, _MAPPED, _READ_ONLY = 1, 2, 8  # cudaHostRegister…


class Runtime(Protocol):
    """What a `HostRegistration` needs of the device's runtime."""

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


class HostRegistration:
    """Registers mapped memory, such as `HostBuffer.tensor`, in this process, until `close`.

    All its pages become resident and stay so. If the driver refuses the whole it is asked for slices; if it
    refuses those, one warning says so with what helps, and `copy_slabs` takes two hops instead of one.
    """

    def __init__(
        self,
        memory: Tensor,
        name: str = "host buffer",
        *,
        read_only: bool = False,
        runtime: Runtime | None = None,
        slice_bytes: int = SLICE_BYTES,
        staging_bytes: int = STAGING_BYTES,
        device_copy: SlabCopy = copy_slabs,
    ) -> None:
        """`memory` is a contiguous CPU tensor; its pages must not be registered yet.

        `name` is what users call it. Memory that is mapped read-only must be registered as such. `device_copy` moves
        slabs between the device and memory that it reaches.
        """
        assert memory.is_cpu and memory.is_contiguous(), (memory.device, memory.stride())
        assert slice_bytes > 0 and slice_bytes % mmap.PAGESIZE == 0, slice_bytes
        self._runtime = runtime or CudaRuntime()
        self._name, self._read_only, self._memory = name, read_only, memory
        self._device_copy = device_copy
        self._spans: list[tuple[int, int]] = []
        self._staged: StagedCopies | None = None
        self._closed = False
        start, stop = _pages(memory)
        error = self._register(start, stop, slice_bytes)
        if error:
            logger.warning("%s", self._refusal(stop - start, error))
            self._staged = StagedCopies(self._new_pinned, self._runtime.record, staging_bytes, device_copy)

    @property
    def registered(self) -> bool:
        """Whether the device reaches the memory itself."""
        return self._staged is None and not self._closed

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) of each registered slice: a copy by the driver may not cross from one to the next."""
        return tuple(self._spans)

    def copy_slabs(self, near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
        """As `transfers.copy_slabs`, for a `far` in this memory; give it to `swap_out` and `swap_in` as `copy`.

        In one hop it runs on the current stream and waits for nothing. In two, what goes to the host is there on
        return, and what comes from it has been read on return: earlier copies to it must be done by then.
        """
        assert not self._closed, f"the registration of the {self._name} is closed"
        if self._staged is not None:
            self._staged.copy_slabs(near, far, table, to_host)
        else:
            self._device_copy(near, far, table, to_host)

    def close(self) -> None:
        """Wait for the device, then give the pages back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._staged is not None:
            self._staged.close()
        if self._spans:
            self._runtime.synchronize()
            self._unregister()
        del self._memory

    def __enter__(self) -> HostRegistration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _register(self, start: int, stop: int, slice_bytes: int) -> int:
        """Register the pages whole, or else in slices; 0, or the error, with nothing registered."""
        error = self._register_slices(start, stop, stop - start)
        if error and slice_bytes < stop - start:
            error = self._register_slices(start, stop, slice_bytes)
        return error

    def _register_slices(self, start: int, stop: int, size: int) -> int:
        for address in range(start, stop, max(size, 1)):
            length = min(size, stop - address)
            error = self._runtime.register(address, length, self._read_only)
            if error:
                self._unregister()
                return error
            self._spans.append((address, length))
        return 0

    def _unregister(self) -> None:
        while self._spans:
            address, size = self._spans.pop()
            error = self._runtime.unregister(address)
            if error:
                logger.warning(
                    "%s: %s of it could not be unregistered: %s (CUDA error %d)",
                    self._name,
                    format_bytes(size),
                    self._runtime.explain(error),
                    error,
                )

    def _refusal(self, size: int, error: int) -> str:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        remedy = f"make the {self._name} smaller, or free host memory"
        if limit != resource.RLIM_INFINITY:
            remedy = (
                f"raise the limit of locked memory, {format_bytes(limit)} now (`ulimit -l unlimited`, in a "
                f"container `--ulimit memlock=-1`), or {remedy}"
            )
        return (
            f"{self._name}: {format_bytes(size)} cannot be registered with CUDA ({self._runtime.explain(error)}, "
            f"error {error}), so copies pass through a staging buffer, at half the speed or less; {remedy}"
        )

    def _new_pinned(self, size: int) -> Tensor:
        try:
            return self._runtime.pinned(size)
        except RuntimeError as error:
            raise MemoryBudgetError(
                f"{self._name}: neither can it be registered with CUDA, nor are there {format_bytes(size)} of pinned "
                f"memory to copy through: {str(error).splitlines()[0]}"
            ) from error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _pages(memory: Tensor) -> tuple[int, int]:
    """The first address and that behind the last of the pages that hold `memory`."""
    if not memory.numel():
        return 0, 0
    page = mmap.PAGESIZE
    start = memory.data_ptr()
    return start // page * page, -(-(start + memory.nbytes) // page) * page
