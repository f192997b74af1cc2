"""Copying boxes of weights: past the caches by the native kernel on CPU ranks, by torch everywhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from torch import Tensor

from seesaw.native.build import load
from seesaw.weights.intervals import Region

_CopyRows = Callable[..., None]


def copy_box(source: Tensor, origin: Region, target: Tensor, place: Region) -> None:
    """Copy the box `origin` of `source` to the box `place` of `target`, converting the element type on the way.

    On an accelerator, where both are, it is launched on the current stream.
    """
    wanted, room = box(source, origin), box(target, place)
    kernel = _kernel() if _in_rows(wanted) and _in_rows(room) and wanted.dtype == room.dtype else None
    if kernel is None or wanted.numel() == 0:
        room.copy_(wanted, non_blocking=True)
        return
    assert wanted.shape == room.shape, (wanted.shape, room.shape)  # the kernel copies by these shapes
    size = wanted.element_size()
    rows = wanted.shape[0] if wanted.dim() == 2 else 1
    strides = (room.stride(0) * size, wanted.stride(0) * size) if rows > 1 else (0, 0)
    kernel(room.data_ptr(), wanted.data_ptr(), rows, wanted.shape[-1] * size, *strides)


def _in_rows(part: Tensor) -> bool:
    """Whether the kernel can take it: rows of elements that lie side by side."""
    return part.is_cpu and 1 <= part.dim() <= 2 and (part.stride(-1) == 1 or part.shape[-1] == 1)


def box(tensor: Tensor, region: Region) -> Tensor:
    """The view of `region`."""
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def _kernel() -> _CopyRows | None:
    library = load()
    return None if library is None else _bind(library)


@cache
def _bind(library: ctypes.CDLL) -> _CopyRows:
    function = library.seesaw_copy_rows
    function.argtypes = (*(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 4)
    function.restype = None
    return function
