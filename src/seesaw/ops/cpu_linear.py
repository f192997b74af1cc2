"""Matrix products on CPU ranks: by the native kernel (`native/linear.cpp`) or by torch, whichever is faster."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from seesaw.native.pointers import TensorPointer
from seesaw.native.program import NotRecordable, RecordedLibrary
from seesaw.ops.torch_ops import TorchOperators

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PROBLEMS = {1: "an unknown type", 2: "no memory for scratch space"}
_COUNT, _INT = ctypes.c_int64, ctypes.c_int32


class CpuLinear:
    """`x @ weight.T + bias`, accumulated in float32 and rounded once.

    The choice follows from the CPU, the type and the number of rows alone, so that the same job computes the same
    tokens; `benchmarks/linear.py` shows what it rests on. Types run natively unless the CPU has better means for
    them, such as matrix instructions; from `packed_rows` rows on both sides are packed into panels.

    With the native kernel a row of the result depends on its row of `x`, the weight, the bias and on which side of
    `packed_rows` the call is, bit for bit: not on the rows beside it, nor on the number of threads. It runs on the
    calling thread, or on `torch.get_num_threads()` OpenMP threads if that is more than one and the product is not
    tiny.
    """

    def __init__(self, library: ctypes.CDLL | RecordedLibrary) -> None:
        self._linear = library["seesaw_linear"]
        self._linear.argtypes = (*[TensorPointer] * 4, *[_COUNT] * 5, *[_INT] * 3)
        self._linear.restype = _INT
        self._torch = TorchOperators()
        better, packed_rows = library["seesaw_linear_better"], library["seesaw_linear_packed_rows"]
        better.argtypes, better.restype = (), _INT
        packed_rows.argtypes, packed_rows.restype = (), _COUNT
        self.packed_rows: int = packed_rows()
        """The fewest rows for which the native kernel packs both sides; fewer are multiplied as they lie."""
        left_to_torch = better()
        self._native = frozenset(dtype for dtype, bit in _DTYPES.items() if not left_to_torch >> bit & 1)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See `Operators.linear`. `x` and `weight` may have strided rows; `out` is contiguous."""
        rows, depth = x.shape
        if not (x.dtype in self._native and rows and depth and weight.shape[0]):
            if x.is_meta:
                raise NotRecordable(f"products of {x.dtype} are made by torch")
            return self._torch.linear(x, weight, bias, out=out)
        return self.native(x, weight, bias, out=out)

    def is_native(self, dtype: torch.dtype) -> bool:
        """Whether products of this type run by the native kernel."""
        return dtype in self._native

    def native(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out: Tensor | None = None,
        packed: bool | None = None,
    ) -> Tensor:
        """The product by a native kernel, whatever the choice would be, `packed` or not if that is said; nothing may
        be empty."""
        rows, depth = x.shape
        columns, weight_depth = weight.shape
        x_stride, x_step = x.stride()
        weight_stride, weight_step = weight.stride()
        dtype = x.dtype
        # the kernel reads and writes memory by these shapes
        assert weight_depth == depth and rows and columns and depth, (x.shape, weight.shape)
        assert (x_step == weight_step == 1) or depth == 1, (x.stride(), weight.stride())
        assert weight.dtype == dtype and weight.is_cpu, (dtype, weight.dtype, weight.device)
        assert x.is_cpu or x.is_meta, x.device  # what is recorded lies nowhere
        if out is None:
            out = x.new_empty(rows, columns)
        else:
            assert out.shape == (rows, columns) and out.is_contiguous(), (out.shape, out.stride())
            assert out.dtype == dtype and out.device == x.device, (out.dtype, out.device)
        if bias is not None:
            assert bias.shape == (columns,) and bias.is_contiguous(), (bias.shape, bias.stride())
            assert bias.dtype == dtype and bias.is_cpu, (bias.dtype, bias.device)
        status = self._linear(
            x,
            weight,
            bias,
            out,
            rows,
            columns,
            depth,
            x_stride,
            weight_stride,
            _DTYPES[dtype],
            rows >= self.packed_rows if packed is None else packed,
            torch.get_num_threads(),
        )
        assert status == 0, f"[{rows}, {depth}] by [{columns}, {depth}]: {_PROBLEMS[status]}"
        return out
