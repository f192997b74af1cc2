"""The Triton kernels of `triton_ops`. A row's result follows from that row alone, whatever is beside it.

All are bound by device memory: per element they do a few operations, where a GPU has time for some hundred per
byte. So each reads its operands once and writes its result once, in accesses of 16 bytes a thread (where strides
allow, which Triton sees from arguments that 16 divides), and nothing is kept between programs. Offsets of rows
are 64-bit: a prefill's `[tokens, 2 * ffn]` can pass 2^31 elements.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 - Triton writes constants of a kernel in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x,
    delta,
    weight,
    out,
    rows,
    columns,
    x_stride,
    delta_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`ROWS` whole rows a program, in registers: what was added and summed is what is then scaled."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    at = x + row * x_stride + column
    value = tl.load(at, mask=inside, other=0.0)
    if ADD:
        other = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / columns + eps)
    by = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (wide * scale * by).to(x.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(
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
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`HEADS` heads of one row a program, as two tiles of `HALF` channels, padded to `CHANNELS`."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    real = channel < HALF
    inside = (head < count) & real
    first = heads + row * row_stride + head.to(tl.int64) * head_stride + channel
    second = first + HALF
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a + b * b, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)
        of_q = head < q_heads
        q_first = tl.load(q_weight + channel, mask=real, other=0.0).to(tl.float32)
        k_first = tl.load(k_weight + channel, mask=real, other=0.0).to(tl.float32)
        q_second = tl.load(q_weight + HALF + channel, mask=real, other=0.0).to(tl.float32)
        k_second = tl.load(k_weight + HALF + channel, mask=real, other=0.0).to(tl.float32)
        # rounded as if the norm had been stored
        a = (a * scale * tl.where(of_q, q_first, k_first)).to(heads.dtype.element_ty).to(tl.float32)
        b = (b * scale * tl.where(of_q, q_second, k_second)).to(heads.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + row * HALF + channel, mask=real, other=0.0)
    s = tl.load(sin + row * HALF + channel, mask=real, other=0.0)
    tl.store(first, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(second, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_rows(gate_up, out, columns, row_stride, BLOCK: tl.constexpr):
    """`BLOCK` columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = gate_up + row * row_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + column, product.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def argmax_parts(logits, out, columns, row_stride, part, parts, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The best of `part` columns of a row a program.

    What `out` gets orders as (value, lower column); with `LAST`, where a row has one part, it is the column.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, columns)
    lane = tl.arange(0, BLOCK)
    place = start + lane
    # A column that is not there cannot win: it is -inf, and to the right of those that are.
    best = tl.load(logits + row * row_stride + place, mask=place < stop, other=float("-inf")).to(tl.float32)
    for first in range(start + BLOCK, stop, BLOCK):
        column = first + lane
        at = logits + row * row_stride + column
        value = tl.load(at, mask=column < stop, other=float("-inf")).to(tl.float32)
        better = ((value > best) | (value != value)) & (best == best)
        best = tl.where(better, value, best)
        place = tl.where(better, column, place)
    bits = best.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    order = tl.where(best == 0.0, 0, order)  # -0 equals 0
    order = tl.where(best != best, 0x7FFFFFFF, order)
    winner = tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), axis=0)
    if LAST:
        winner = 0x7FFFFFFF - (winner & 0x7FFFFFFF)
    tl.store(out + row * parts + tl.program_id(1), winner)


@triton.jit
def argmax_of_parts(winners, out, parts, PARTS: tl.constexpr):
    """The column of the best of a row's `parts`, as `argmax_parts` left them."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    found = tl.load(winners + row * parts + part, mask=part < parts, other=-0x8000000000000000)
    tl.store(out + row, 0x7FFFFFFF - (tl.max(found, axis=0) & 0x7FFFFFFF))
