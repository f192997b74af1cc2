"""Copies of KV in two hops, through a small pinned buffer, where the host's memory cannot be registered."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from seesaw.core.workspace import STAGING_BYTES
from seesaw.device.registration import Fence
from seesaw.kv.transfers import SlabCopy, copy_slabs


class StagedCopies:
    """Slabs by way of two pinned halves in turn: while the device fills or empties one, the host does the other.

    Safe to use from several threads, one copy at a time. Belongs to whoever makes it.
    """

    def __init__(
        self,
        pinned: Callable[[int], Tensor],
        record: Callable[[], Fence],
        staging_bytes: int = STAGING_BYTES,
        device_copy: SlabCopy = copy_slabs,
    ) -> None:
        """`pinned` gives so many bytes of pinned memory as uint8, `record` a fence behind all in the current stream.

        `device_copy` moves slabs between the pool and a half, on the current stream.
        """
        self._pinned, self._record, self._device_copy = pinned, record, device_copy
        self._half_bytes = staging_bytes // 2
        self._halves: list[Tensor] = []
        self._fences: list[Fence | None] = [None, None]
        self._lock = threading.Lock()

    def copy_slabs(self, near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
        """As `transfers.copy_slabs`; checks the blocks.

        To the host, the copy is done on return. To the device, `far` has been read on return, and the device's part
        runs on the current stream.
        """
        table = table.cpu()
        with self._lock:
            self._reserve(near[0].numel() * near.element_size())
            (self._out if to_host else self._in)(near, far, table)

    def close(self) -> None:
        """Wait for the device and let go of the memory. May be called twice."""
        with self._lock:
            for half in range(len(self._halves)):
                self._wait(half)
            self._halves = []

    def _out(self, near: Tensor, far: Tensor, table: Tensor) -> None:
        filled: tuple[int, Tensor, Tensor] | None = None
        for half, blocks, staged, here in self._pieces(near, table):
            self._wait(half)
            self._device_copy(near, blocks, torch.stack((staged[:, 0], here), 1), True)
            self._fences[half] = self._record()
            if filled is not None:
                self._empty(*filled, far)
            filled = half, blocks, torch.stack((here, staged[:, 1]), 1)
        if filled is not None:
            self._empty(*filled, far)

    def _empty(self, half: int, blocks: Tensor, table: Tensor, far: Tensor) -> None:
        self._wait(half)
        copy_slabs(blocks, far, table, True)

    def _in(self, near: Tensor, far: Tensor, table: Tensor) -> None:
        for half, blocks, staged, here in self._pieces(near, table):
            self._wait(half)
            copy_slabs(blocks, far, torch.stack((here, staged[:, 1]), 1), False)
            self._device_copy(near, blocks, torch.stack((staged[:, 0], here), 1), False)
            self._fences[half] = self._record()

    def _pieces(self, near: Tensor, table: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """(half, its blocks, the pairs that go there, the numbers of its blocks), alternately."""
        size = near[0].numel() * near.element_size()
        pieces = []
        most = self._half_bytes // size
        for number, first in enumerate(range(0, len(table), most)):
            half, pairs = number % 2, table[first : first + most]
            flat = self._halves[half][: len(pairs) * size]
            blocks = flat.view(near.dtype).view(len(pairs), *near.shape[1:])
            pieces.append((half, blocks, pairs, torch.arange(len(pairs))))
        return pieces

    def _wait(self, half: int) -> None:
        """Until the device is done with the half: it may still write or read what a copy left there."""
        fence, self._fences[half] = self._fences[half], None
        if fence is not None:
            fence.synchronize()

    def _reserve(self, block_bytes: int) -> None:
        """Halves of at least a block each."""
        if self._halves and self._half_bytes >= block_bytes:
            return
        for half in range(len(self._halves)):
            self._wait(half)
        self._half_bytes = max(self._half_bytes, block_bytes)
        self._halves = [self._pinned(self._half_bytes) for _ in range(2)]
