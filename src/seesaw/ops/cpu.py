"""The operators on CPU ranks by native kernels (`native/small_ops.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seesaw.ops.base import HeadNorms
from seesaw.ops.cpu_linear import CpuLinear
from seesaw.ops.torch_ops import TorchOperators

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The types that the kernels take, and their numbers there."""
_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class CpuOperators(TorchOperators):
    """See `Operators`. One pass over each row in cache, and no temporary tensors.

    Runs on the calling thread, or on `torch.get_num_threads()` OpenMP threads if that is more than one and
    the tensors are large. A row's result depends on that row alone.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(name: str, *arguments: Any) -> Callable[..., None]:
            found = library[name]  # a function object of its own: its types are set for nobody else
            found.argtypes, found.restype = (*arguments, _INT, _INT), None
            return found

        self._rms_norm = function("seesaw_rms_norm", *[_POINTER] * 3, *[_COUNT] * 3, _FLOAT)
        self._add_rms_norm = function("seesaw_add_rms_norm", *[_POINTER] * 4, *[_COUNT] * 4, _FLOAT)
        self._rotate = function("seesaw_rotate", *[_POINTER] * 5, *[_COUNT] * 5, _FLOAT)
        self._silu_mul = function("seesaw_silu_mul", *[_POINTER] * 2, *[_COUNT] * 3)
        self._argmax = function("seesaw_argmax", *[_POINTER] * 2, *[_COUNT] * 3)
        self._linear = CpuLinear(library)

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
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
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
        out = torch.empty_like(hidden)
        self._add_rms_norm(
            hidden.data_ptr(),
            delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
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
            heads.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
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
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            _row_stride(gate_up),
            DTYPES[gate_up.dtype],
            torch.get_num_threads(),
        )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """See `Operators.argmax`."""
        rows, columns = logits.shape
        assert columns >= 1, logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._argmax(
            logits.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            _row_stride(logits),
            DTYPES[logits.dtype],
            torch.get_num_threads(),
        )
        return out


def _row_stride(matrix: Tensor) -> int:
    stride, step = matrix.stride()
    assert step == 1 or matrix.shape[1] <= 1, matrix.stride()
    return stride


def _head_weights(norms: HeadNorms | None, heads: Tensor) -> tuple[int | None, int | None, int, float]:
    if norms is None:
        return None, None, 0, 0.0
    for weight in (norms.q_weight, norms.k_weight):
        assert weight.shape == heads.shape[2:] and weight.dtype == heads.dtype, (weight.shape, weight.dtype)
        assert weight.is_contiguous()
    return norms.q_weight.data_ptr(), norms.k_weight.data_ptr(), norms.q_heads, norms.eps
