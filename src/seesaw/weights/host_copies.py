"""From the weight store into a GPU's memory: in one hop where the store is registered, else through pinned memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from seesaw.core.workspace import STAGING_BYTES
from seesaw.device.registration import SLICE_BYTES, Fence, Registration, Runtime
from seesaw.native.triton_here import missing_for_triton
from seesaw.weights.copies import box
from seesaw.weights.intervals import Region

logger = logging.getLogger(__name__)

CopyRows = Callable[[Tensor, Tensor], None]
"""As `triton_copies.copy_rows`."""


class HostCopies:
    """Copies boxes of parameters to the device, on the current stream and without waiting for it.

    Owns the registration of the store's mappings, and where that is refused two pinned halves: the host fills one
    while the device empties the other. One thread at a time.
    """

    def __init__(
        self,
        mappings: Sequence[Tensor],
        *,
        runtime: Runtime | None = None,
        slice_bytes: int = SLICE_BYTES,
        staging_bytes: int = STAGING_BYTES,
        copy_rows: CopyRows | None = None,
    ) -> None:
        """`mappings` as `HostWeightStore` has them; `copy_rows` stands in for the kernel in tests."""
        self._pages = Registration(
            mappings,
            "weights",
            remedy="free host memory",
            read_only=True,
            runtime=runtime,
            slice_bytes=slice_bytes,
        )
        self._kernel = copy_rows or _kernel()
        self._half_bytes = staging_bytes // 2
        self._halves: list[Tensor] = []
        self._fences: list[Fence | None] = [None, None]
        self._turn = 0

    @property
    def registered(self) -> bool:
        """Whether the device reaches all weights itself."""
        return self._pages.registered

    def copy_box(self, source: Tensor, origin: Region, target: Tensor, place: Region) -> None:
        """Copy the box `origin` of a parameter of the store to the box `place` of `target` on the device.

        Moves these bytes and no others over the link, as they are stored; the device converts them. Memory that is
        not registered has been read on return.
        """
        wanted, room = _rows(box(source, origin)), _rows(box(target, place))
        assert wanted.shape == room.shape, (wanted.shape, room.shape)
        if not wanted.numel():
            return
        if _alike(wanted, room) and self._pages.in_one_span(wanted):
            room.copy_(
                wanted, non_blocking=True
            )  # by a copy engine: no program of the device waits for the link
        elif self._kernel is not None and self._pages.reaches(wanted) and _aligned(wanted, room):
            self._kernel(wanted, room)
        else:
            self._stage(wanted, room)

    def close(self) -> None:
        """Wait for the device and give the pages back. May be called twice."""
        for half in range(len(self._halves)):
            self._wait(half)
        self._halves = []
        self._pages.close()

    def _stage(self, wanted: Tensor, room: Tensor) -> None:
        if not self._halves:
            self._halves = [self._pages.pinned(self._half_bytes) for _ in self._fences]
        most = self._half_bytes // wanted.element_size()
        columns = min(most, wanted.shape[1])
        rows = most // columns
        for top in range(0, wanted.shape[0], rows):
            for left in range(0, wanted.shape[1], columns):
                part = slice(top, top + rows), slice(left, left + columns)
                self._by_half(wanted[part], room[part])

    def _by_half(self, wanted: Tensor, room: Tensor) -> None:
        half, self._turn = self._turn, 1 - self._turn
        self._wait(half)
        staged = self._halves[half][: wanted.numel() * wanted.element_size()]
        staged = staged.view(wanted.dtype).view(wanted.shape)
        staged.copy_(wanted)
        if _alike(staged, room):
            room.copy_(staged, non_blocking=True)
        elif self._kernel is not None:
            self._kernel(staged, room)
        else:  # through as much device memory, which the plan has for staging
            room.copy_(staged.to(room.device, non_blocking=True))
        self._fences[half] = self._pages.runtime.record()

    def _wait(self, half: int) -> None:
        """Until the device is done with the half."""
        fence, self._fences[half] = self._fences[half], None
        if fence is not None:
            fence.synchronize()


def _rows(part: Tensor) -> Tensor:
    """As `[rows, columns]`."""
    assert 1 <= part.dim() <= 2, part.shape
    return part if part.dim() == 2 else part[None]


def _alike(wanted: Tensor, room: Tensor) -> bool:
    """Whether it takes no more than moving bytes from here to there."""
    return wanted.dtype == room.dtype and wanted.is_contiguous() and room.is_contiguous()


def _aligned(wanted: Tensor, room: Tensor) -> bool:
    """Whether the kernel can read it: files need not align their parameters, and only bits as they are may lie so."""
    return wanted.dtype == room.dtype or wanted.data_ptr() % wanted.element_size() == 0


def _kernel() -> CopyRows | None:
    missing = missing_for_triton()
    if missing is not None:
        logger.warning("parts of rows of weights pass through a staging buffer, which is slow: %s", missing)
        return None
    from seesaw.weights.triton_copies import copy_rows

    return copy_rows
