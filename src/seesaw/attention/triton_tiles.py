"""What the Triton kernels of attention have in common: products of tiles, paging, the running softmax."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

LOG2_E = math.log2(math.e)
"""Scores are multiplied by it: the GPU's instruction is a power of two."""


@triton.jit
def multiply(a, b, WIDE: tl.constexpr):
    """`a @ b` in float32. `WIDE` is for the interpreter, whose products of bfloat16 are wrong."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def token_offsets(table, tokens, inside, block_stride, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where K of `tokens` lies behind the first token of its head in block 0; 64-bit: pools pass 2^31 elements."""
    block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM


@triton.jit
def fold(scores, v, top, total, mixed, WIDE: tl.constexpr):
    """Take a tile of scores `[M, N]` (-inf: not seen) and its values `[N, D]` into the running softmax.

    `top` and `total` `[M]` are the greatest score and the sum of weights so far, `mixed` `[M, D]` the weighted
    values. A tile of which a row sees nothing leaves that row as it is, bit for bit.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    by = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf were NaN
    shrink = tl.exp2(top - by)
    weights = tl.exp2(scores - by[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + multiply(weights.to(v.dtype), v, WIDE)
    return higher, total, mixed


INTERPRETED = not isinstance(multiply, triton.JITFunction)
"""Whether this process runs kernels in Triton's interpreter, on CPU tensors."""


def operand_type(q: torch.dtype, pool: torch.dtype) -> Any:
    """The type in which products are taken: of both, or float32 where they differ."""
    return _TYPES[q if q == pool else torch.float32]
