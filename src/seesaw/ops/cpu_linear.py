"""Matrix products on CPU ranks: by the native kernel (`native/linear.cpp`) or by torch, whichever is faster."""

from __future__ import annotations

import ctypes
import enum

import torch
from torch import Tensor

from seesaw.ops.torch_ops import TorchOperators

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PROBLEMS = {1: "an unknown type", 2: "no memory for scratch space"}
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

FLOAT32_ROWS = 32
"""The most rows of float32 for which the native kernel is taken: above, the vendor's library is faster."""


class _Better(enum.IntFlag):
    """Types for which torch has better means on this CPU; bits of `seesaw_linear_better`."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 4


class CpuLinear:
    """`x @ weight.T + bias`, accumulated in float32 and rounded once.

    The choice between the native kernel and torch follows from the CPU, the type and the number of rows alone,
    so that the same job computes the same tokens; `benchmarks/linear.py` shows what it rests on. bfloat16 and
    float16 run natively unless the CPU multiplies them by instructions of its own; float32 does with up to
    `FLOAT32_ROWS` rows.

    With the native kernel a row of the result depends on its row of `x`, the weight and the bias alone, bit for
    bit: not on the rows beside it, nor on the number of threads. It runs on the calling thread, or on
    `torch.get_num_threads()` OpenMP threads if that is more than one and the product is not tiny.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear = library["seesaw_linear"]
        self._linear.argtypes = (*[_POINTER] * 4, *[_COUNT] * 5, _INT, _INT)
        self._linear.restype = _INT
        self._torch = TorchOperators()
        better = library["seesaw_linear_better"]
        better.argtypes, better.restype = (), _INT
        self._better = _Better(better())

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See `Operators.linear`. `x` and `weight` may have strided rows; `out` is contiguous."""
        if not self.is_native(x.dtype, x.shape[0]) or 0 in (*x.shape, weight.shape[0]):
            return self._torch.linear(x, weight, bias, out=out)
        return self.native(x, weight, bias, out=out)

    def is_native(self, dtype: torch.dtype, rows: int) -> bool:
        """Whether products of so many rows run by the native kernel."""
        if dtype == torch.float32:
            return rows <= FLOAT32_ROWS and _Better.FLOAT32 not in self._better
        if dtype == torch.bfloat16:
            return _Better.BFLOAT16 not in self._better
        return dtype == torch.float16 and _Better.FLOAT16 not in self._better

    def native(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The product by the native kernel, whatever the choice would be; nothing may be empty."""
        rows, depth = x.shape
        columns = weight.shape[0]
        if out is None:
            out = x.new_empty(rows, columns)
        _check(x, weight, bias, out)
        status = self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            depth,
            x.stride(0),
            weight.stride(0),
            _DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        assert status == 0, f"[{rows}, {depth}] by [{columns}, {depth}]: {_PROBLEMS[status]}"
        return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """What the kernel takes for granted; it reads and writes memory by these shapes."""
    (rows, depth), columns = x.shape, weight.shape[0]
    assert weight.shape == (columns, depth) and rows and columns and depth, (x.shape, weight.shape)
    assert out.shape == (rows, columns) and out.is_contiguous(), (out.shape, out.stride())
    for matrix in (x, weight):
        assert matrix.stride(1) == 1 or depth == 1, matrix.stride()
    if bias is not None:
        assert bias.shape == (columns,) and bias.is_contiguous() and bias.dtype == x.dtype, bias.shape
    assert x.dtype == weight.dtype == out.dtype and x.device.type == "cpu", (x.dtype, weight.dtype, out.dtype)
