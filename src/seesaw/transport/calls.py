"""What the native transports share: type numbers, member arrays, and how a call is carried to its end."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seesaw.transport.base import Members

DONE, PENDING = 0, 1
"""Answers of the native calls; the meaning of others is the transport's own."""

CHANNELS = 2

_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}
"""`seesaw::SumType`."""


def sum_type(x: Tensor) -> int:
    """The number of the type of `x`. Raises `TypeError` for types that are not summed."""
    number = _TYPES.get(x.dtype)
    if number is None:
        raise TypeError(f"all-reduce: {x.dtype} is not summed; use one of {[str(t) for t in _TYPES]}")
    return number


@lru_cache(maxsize=256)
def member_array(members: Members) -> ctypes.Array[ctypes.c_int32]:
    """The members as the native calls take them."""
    return (ctypes.c_int32 * len(members))(*members)


def run_to_end(status: int, resume: Callable[[ctypes.c_void_p], int], handle: ctypes.c_void_p) -> int:
    """Carry a call on until it is not `PENDING`.

    A native call comes back every half second, or when a signal arrives, so that Python can run its signal
    handlers; should one of them raise, the transport is good for nothing but `close`.
    """
    while status == PENDING:
        status = resume(handle)
    return status


class Closed:
    """Stands in for the library of a transport that was closed, whose native part is gone."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a transport that was closed")
