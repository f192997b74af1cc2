"""The operators on CUDA ranks: fused Triton kernels (`triton_kernels`), and the vendor's library for products."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2

from seesaw.ops import triton_kernels as kernels
from seesaw.ops.base import HeadNorms
from seesaw.ops.torch_ops import TorchOperators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types that the kernels take."""

# Tiles and warps are the same for SM80, SM89 and SM90: what bounds a kernel is how many bytes are in flight, and
# that takes 16 bytes or more a thread and enough threads, which differ little between them (latency times
# bandwidth is 1 to 2 MB on all). They depend on the width of a row and never on the number of rows, so that a
# row's sums run in the same order in every batch.
_WIDEST_ROW = 1 << 15
"""Columns that 32 warps hold in registers, of float32 as well; the widest model has half as many."""
_ROW_TILE = 1024
"""Elements a program of `norm_rows` takes at least: rows of narrow models go several to a program."""
_PER_WARP = 512
"""Elements of a row for each warp: two accesses of 16 bytes a thread, of 16-bit types."""
_HEADS_TILE = 1024
"""Channels of each half of the heads that a program of `rotate_heads` takes: 8 a thread of 4 warps."""
_SILU_TILE = 1024
_ARGMAX_TILE = 2048
_ARGMAX_PROGRAMS = 1024
"""Programs that fill a device (7 or more of 4 warps for each SM): rows of logits are parted for as many."""


class TritonOperators(TorchOperators):
    """See `Operators`. Every kernel passes over its data once and makes no temporary tensors.

    Bytes of a call, which over the device's bandwidth bound its time; e is the size of an element:

    | | reads | writes |
    |---|---|---|
    | `rms_norm` `[M, K]` | (M + 1) K e | M K e |
    | `add_rms_norm` `[M, K]` | (2 M + 1) K e | 2 M K e |
    | `rotate` `[M, H, D]` | M H D e + 4 M D | M H D e |
    | `silu_mul` `[M, 2 F]` | 2 M F e | M F e |
    | `argmax` `[M, N]` | M N e | 8 M, and 16 a part for few rows |

    In the small operators a row's result depends on that row alone. They run on the current stream of the
    current device, wait for nothing, allocate through torch, and are launched by shapes alone, so that a CUDA
    graph can hold them once each has run before.
    """

    name = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.rms_norm`."""
        return _norm(x, None, weight, eps)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.add_rms_norm`."""
        assert delta.shape == hidden.shape and delta.dtype == hidden.dtype, (delta.shape, delta.dtype)
        return _norm(hidden, delta, weight, eps)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> Tensor:
        """See `Operators.rotate`."""
        rows, count, head_dim = heads.shape
        row_stride, head_stride, step = heads.stride()
        assert step == 1 and head_dim % 2 == 0, (heads.shape, heads.stride())
        half = head_dim // 2
        for angles in (cos, sin):
            assert angles.shape == (rows, half) and angles.is_contiguous(), angles.shape
            assert angles.dtype == torch.float32, angles.dtype
        if not heads.numel():
            return heads
        q_weight, k_weight, q_heads, eps = (heads, heads, 0, 0.0) if norms is None else _checked(norms, heads)
        channels = next_power_of_2(half)
        group = min(next_power_of_2(count), max(1, _HEADS_TILE // channels))
        kernels.rotate_heads[(rows, -(-count // group))](
            heads,
            cos,
            sin,
            q_weight,
            k_weight,
            count,
            q_heads,
            row_stride,
            head_stride,
            eps,
            NORM=norms is not None,
            HALF=half,
            HEADS=group,
            CHANNELS=channels,
            num_warps=4,
        )
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Operators.silu_mul`."""
        rows, columns = gate_up.shape
        assert columns % 2 == 0, gate_up.shape
        columns //= 2
        out = gate_up.new_empty(rows, columns)
        if out.numel():
            tile = min(_SILU_TILE, next_power_of_2(columns))
            kernels.silu_mul_rows[(rows, -(-columns // tile))](
                gate_up, out, columns, _row_stride(gate_up), BLOCK=tile, num_warps=4
            )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """See `Operators.argmax`. Few rows are looked at in parts, by two kernels; many by one."""
        rows, columns = logits.shape
        assert 1 <= columns < 1 << 31, logits.shape
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if not rows:
            return out
        tile = min(_ARGMAX_TILE, next_power_of_2(columns))
        tiles = -(-columns // tile)
        part = tile * -(-tiles // min(tiles, -(-_ARGMAX_PROGRAMS // rows)))
        parts = -(-columns // part)
        winners = out if parts == 1 else out.new_empty(rows, parts)
        kernels.argmax_parts[(rows, parts)](
            logits,
            winners,
            columns,
            _row_stride(logits),
            part,
            parts,
            LAST=parts == 1,
            BLOCK=tile,
            num_warps=4,
        )
        if parts > 1:
            kernels.argmax_of_parts[(rows,)](winners, out, parts, PARTS=next_power_of_2(parts), num_warps=1)
        return out


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, columns = x.shape
    assert columns <= _WIDEST_ROW, x.shape
    assert weight.shape == (columns,) and weight.dtype == x.dtype and weight.is_contiguous(), weight.shape
    out = x.new_empty(rows, columns)
    if not out.numel():
        return out
    width = next_power_of_2(columns)
    height = max(1, _ROW_TILE // width)
    kernels.norm_rows[(-(-rows // height),)](
        x,
        x if delta is None else delta,
        weight,
        out,
        rows,
        columns,
        _row_stride(x),
        0 if delta is None else _row_stride(delta),
        eps,
        ADD=delta is not None,
        ROWS=height,
        COLUMNS=width,
        num_warps=min(32, max(4, width // _PER_WARP)),
    )
    return out


def _row_stride(matrix: Tensor) -> int:
    stride, step = matrix.stride()
    assert step == 1 or matrix.shape[1] <= 1, matrix.stride()
    return stride


def _checked(norms: HeadNorms, heads: Tensor) -> tuple[Tensor, Tensor, int, float]:
    for weight in (norms.q_weight, norms.k_weight):
        assert weight.shape == heads.shape[2:] and weight.dtype == heads.dtype, (weight.shape, weight.dtype)
        assert weight.is_contiguous()
    return norms.q_weight, norms.k_weight, norms.q_heads, norms.eps
