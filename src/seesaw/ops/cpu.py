"""The operators on CPU ranks by native kernels (`native/small_ops.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from seesaw.native.pointers import TensorPointer
from seesaw.native.program import RecordedLibrary, Recorder
from seesaw.ops.base import HeadNorms
from seesaw.ops.cpu_linear import CpuLinear
from seesaw.ops.torch_ops import TorchOperators

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The types that the kernels take, and their numbers there."""
_COUNT, _INT, _FLOAT = ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class CpuOperators(TorchOperators):
    """See `Operators`. One pass over each row in cache, and no temporary tensors.

    Runs on the calling thread, or on `torch.get_num_threads()` OpenMP threads if that is more than one and
    the tensors are large. A row's result depends on that row alone.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL | RecordedLibrary) -> None:
        def function(name: str, *arguments: Any) -> Callable[..., None]:
            found = library[name]  # a function object of its own: its types are set for nobody else
            found.argtypes, found.restype = (*arguments, _INT, _INT), None
            return found

        self._rms_norm = function("seesaw_rms_norm", *[TensorPointer] * 3, *[_COUNT] * 3, _FLOAT)
        self._add_rms_norm = function("seesaw_add_rms_norm", *[TensorPointer] * 4, *[_COUNT] * 4, _FLOAT)
        self._rotate = function("seesaw_rotate", *[TensorPointer] * 5, *[_COUNT] * 5, _FLOAT)
        self._silu_mul = function("seesaw_silu_mul", *[TensorPointer] * 2, *[_COUNT] * 3)
        self._argmax = function("seesaw_argmax", *[TensorPointer] * 2, *[_COUNT] * 3)
        self._join_columns = library["seesaw_join_columns"]
        self._join_columns.argtypes = (*[TensorPointer] * 2, _COUNT, ctypes.c_void_p, *[_COUNT] * 2)
        self._join_columns.restype = None
        self._linear = CpuLinear(library)

    def recorded_by(self, recorder: Recorder) -> CpuOperators:
        """These operators, to be called over stand-ins: `recorder` notes down their native calls."""
        return CpuOperators(recorder.library())

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See `Operators.linear`."""
        return self._linear(x, weight, bias, out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.rms_norm`."""
        rows, columns = x.shape
        stride = _row_stride(x)
        assert weight.shape == (columns,) and weight.dtype == x.dtype, (weight.shape, weight.dtype)
        out = x.new_empty(x.shape)
        self._rms_norm(
            x,
            weight,
            out,
            rows,
            columns,
            stride,
            eps,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        return out

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.add_rms_norm`."""
        rows, columns = hidden.shape
        hidden_stride, delta_stride = _row_stride(hidden), _row_stride(delta)
        assert delta.shape == hidden.shape and delta.dtype == hidden.dtype, (delta.shape, delta.dtype)
        assert weight.shape == (columns,) and weight.dtype == hidden.dtype, (weight.shape, weight.dtype)
        out = hidden.new_empty(hidden.shape)
        self._add_rms_norm(
            hidden,
            delta,
            weight,
            out,
            rows,
            columns,
            hidden_stride,
            delta_stride,
            eps,
            DTYPES[hidden.dtype],
            torch.get_num_threads(),
        )
        return out

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> Tensor:
        """See `Operators.rotate`."""
        rows, count, head_dim = heads.shape
        row_stride, head_stride, step = heads.stride()
        assert step == 1 and (head_stride == head_dim or count <= 1) and head_dim % 2 == 0, heads.stride()
        for angles in (cos, sin):
            assert angles.shape == (rows, head_dim // 2) and angles.is_contiguous(), angles.shape
            assert angles.dtype == torch.float32, angles.dtype
        q_weight, k_weight, q_heads, eps = _head_weights(norms, heads)
        self._rotate(
            heads,
            cos,
            sin,
            q_weight,
            k_weight,
            rows,
            count,
            q_heads,
            head_dim,
            row_stride,
            eps,
            DTYPES[heads.dtype],
            torch.get_num_threads(),
        )
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Operators.silu_mul`."""
        rows, columns = gate_up.shape
        assert columns % 2 == 0, gate_up.shape
        columns //= 2
        out = gate_up.new_empty(rows, columns)
        self._silu_mul(
            gate_up,
            out,
            rows,
            columns,
            _row_stride(gate_up),
            DTYPES[gate_up.dtype],
            torch.get_num_threads(),
        )
        return out

    def join_columns(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Operators.join_columns`."""
        first, bounds = parts[0], _bounds(tuple(part.shape[1] for part in parts))
        rows, item = first.shape[0], first.element_size()
        behind = first.storage_offset()
        for part in parts:
            assert part.is_contiguous() and part.shape[0] == rows and part.storage_offset() == behind, (
                part.shape
            )
            behind += part.numel()
        out = first.new_empty(rows, bounds[len(parts)])
        self._join_columns(first, out, rows, bounds, len(parts), item)
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """See `Operators.argmax`."""
        rows, columns = logits.shape
        assert columns >= 1, logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._argmax(
            logits,
            out,
            rows,
            columns,
            _row_stride(logits),
            DTYPES[logits.dtype],
            torch.get_num_threads(),
        )
        return out


@lru_cache(maxsize=256)
def _bounds(widths: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Where matrices of these widths begin when they are side by side, and how wide they are."""
    return (ctypes.c_int64 * (len(widths) + 1))(0, *accumulate(widths))


def _row_stride(matrix: Tensor) -> int:
    stride, step = matrix.stride()
    assert step == 1 or matrix.shape[1] <= 1, matrix.stride()
    return stride


def _head_weights(norms: HeadNorms | None, heads: Tensor) -> tuple[Tensor | None, Tensor | None, int, float]:
    if norms is None:
        return None, None, 0, 0.0
    for weight in (norms.q_weight, norms.k_weight):
        assert weight.shape == heads.shape[2:] and weight.dtype == heads.dtype, (weight.shape, weight.dtype)
        assert weight.is_contiguous()
    return norms.q_weight, norms.k_weight, norms.q_heads, norms.eps
