"""Memory for the weights of a rank: counted, and on a host laid out in one stretch that has its pages beforehand."""

from __future__ import annotations

import weakref
from math import prod

import torch
from torch import Tensor

from seesaw.device.host_memory import reserve
from seesaw.weights.arena import Arena


class MemoryLedger:
    """Bytes of the device tensors that exist, counted when memory is taken and when it is really freed.

    A tensor that somebody still refers to, even by a view, counts until that reference is gone. With an `arena`
    tensors lie in it as long as they fit.
    """

    def __init__(self, arena: HostArena | None = None) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._arena = arena

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the only place where device memory for weights is taken."""
        size = prod(shape) * dtype.itemsize
        place = self._arena.take(size) if self._arena and size else None
        if self._arena is None or place is None:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        else:
            tensor = self._arena.tensor(place, shape, dtype)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(tensor.untyped_storage(), self._release, size, place).atexit = False
        return tensor

    def _release(self, size: int, place: int | None) -> None:
        self.bytes -= size
        if self._arena is not None and place is not None:
            self._arena.give(place, size)


class HostArena(Arena):
    """Host memory in which a rank lays its weights, so that transitions neither scatter them over a growing heap nor
    wait for the system to clear pages.
    """

    def __init__(self, size: int) -> None:
        """Of `size` bytes. Raises `MemoryBudgetError` if the system refuses."""
        super().__init__(size)
        self._region = reserve(self.size, "weights", filled=True)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes from `offset` on, as a tensor with a storage of its own."""
        flat = torch.frombuffer(self._region, dtype=dtype, count=prod(shape), offset=offset)
        return flat.view(shape)
