"""A Triton kernel for sequences with several queries, over the paged pool: chunks of prompts, mixed batches.

Bound by arithmetic: 4 operations for each (query, key) pair, query head and channel, over the tensor cores' peak. K
and V are read where they lie, so that a chunk of a prompt with a long context gathers nothing. A tile holds all
query heads of a group for some tokens in a row; the tiles of a sequence and KV head run side by side, and find K and
V in L2. Only tiles on the diagonal and at the edge of the window pay for masks.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.attention.triton_tiles import (
    INTERPRETED,
    LOG2_E,
    fold,
    multiply,
    operand_type,
    token_offsets,
)

_FEWEST_SEQUENCES = 64


@triton.jit
def _tiles(
    first,
    end,
    q,
    keys,
    table,
    places,
    known,
    oldest,
    scale,
    block_stride,
    top,
    total,
    mixed,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Take the tiles `first .. end` of K and V into the sums of queries at `places`.

    Tokens `oldest .. known` are read. Unless `MASKED`, every query sees all of every tile.
    """
    channel = tl.arange(0, CHANNELS)
    real = channel < HEAD_DIM
    for tile in range(first, end):
        token = tile * TILE + tl.arange(0, TILE)
        inside = token >= 0
        if MASKED:
            inside = token < known
            if WINDOW > 0:
                inside &= token >= oldest
        at = token_offsets(table, token, inside, block_stride, BLOCK_SIZE, HEAD_DIM)
        k = tl.load(keys + at[None, :] + channel[:, None], mask=inside[None, :] & real[:, None], other=0.0)
        scores = multiply(q, k.to(q.dtype), WIDE) * scale
        if MASKED:
            seen = token[None, :] <= places[:, None]
            if WINDOW > 0:
                seen &= token[None, :] > places[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(
            keys + PLANE + at[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        top, total, mixed = fold(scores, v.to(q.dtype), top, total, mixed, WIDE)
    return top, total, mixed


@triton.jit
def _queries(query_starts, sequences, SEQUENCES: tl.constexpr, QUERIES: tl.constexpr):
    """Which queries are this program's: their sequence, its first row and how many it has, and the first in it.

    Sequence b has the programs from `query_starts[b] // QUERIES + b` on, which is room enough for its tiles; a few
    are left over. The last tiles, with the most to read, come first.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    every = tl.arange(0, SEQUENCES)
    starts = tl.load(query_starts + every, mask=every < sequences, other=0)
    begun = (every < sequences) & (starts // QUERIES + every <= program)
    sequence = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    return sequence, start, count, (program - start // QUERIES - sequence) * QUERIES


@triton.jit
def _bounds(first_place, last_place, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The oldest token that queries at these places see, and the tiles where each kind begins: those at the window's
    edge, those that all queries see whole, those on the diagonal."""
    whole = (first_place + 1) // TILE
    if WINDOW > 0:
        oldest = tl.maximum(first_place - WINDOW + 1, 0)
        edge = oldest // TILE
        clear = tl.maximum(last_place - WINDOW + TILE, 0) // TILE
        return oldest, edge, tl.minimum(tl.maximum(clear, edge), whole), whole
    else:
        return whole * 0, whole * 0, whole * 0, whole


@triton.jit(do_not_specialize=["sequences", "table_width"])
def _prefill(
    q,
    pool,
    out,
    query_starts,
    context_starts,
    block_tables,
    sequences,
    table_width,
    scale,
    q_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`QUERIES` tokens of one sequence, for the group of one KV head. Sequences with one query are left to decode."""
    head = tl.program_id(1)
    sequence, start, count, asked = _queries(query_starts, sequences, SEQUENCES, QUERIES)
    if (count > 1) & (asked < count):
        line, channel = tl.arange(0, QUERIES * PADDED), tl.arange(0, CHANNELS)
        token, group = asked + line // PADDED, line % PADDED
        inside = ((token < count) & (group < GROUP))[:, None] & (channel < HEAD_DIM)[None, :]
        within = ((head * GROUP + group) * HEAD_DIM)[:, None] + channel[None, :]
        row = (start + token).to(tl.int64)[:, None]
        asking = tl.load(q + row * q_stride + within, mask=inside, other=0.0).to(OPERAND)

        context = tl.load(context_starts + sequence)
        last_place = context + tl.minimum(asked + QUERIES, count) - 1
        oldest, begin, clear, whole = _bounds(context + asked, last_place, WINDOW, TILE)
        end = clear
        table = block_tables + sequence.to(tl.int64) * table_width
        keys = pool + head * (BLOCK_SIZE * HEAD_DIM)
        top = tl.full([QUERIES * PADDED], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * PADDED], tl.float32)
        mixed = tl.zeros([QUERIES * PADDED, CHANNELS], tl.float32)
        for kind in tl.static_range(0 if WINDOW > 0 else 1, 3):
            if kind == 1:
                end = whole
            if kind == 2:
                end = last_place // TILE + 1
            top, total, mixed = _tiles(
                begin, end, asking, keys, table, context + token, last_place + 1, oldest, scale, block_stride,
                top, total, mixed, KV_HEADS * BLOCK_SIZE * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, WINDOW, CHANNELS, TILE,
                kind != 1, WIDE
            )  # fmt: skip
            begin = end
        at = out + row * (KV_HEADS * GROUP * HEAD_DIM) + within
        tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill(
    q: Tensor,
    pool_layer: Tensor,
    batch: AttentionBatch,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
) -> None:
    """Attention of the sequences with several queries, into their rows of `out` `[Q, q_heads * head_dim]`."""
    sequences, width = batch.block_tables.shape
    queries, q_heads, head_dim = q.shape
    if not queries:
        return
    _, _, kv_heads, block_size, _ = pool_layer.shape
    group = q_heads // kv_heads
    padded = triton.next_power_of_2(group)
    operand = operand_type(q.dtype, pool_layer.dtype)
    rows, tile, warps, stages = _launch(head_dim, 4 if operand == tl.float32 else 2)
    tokens = max(1, rows // padded)
    _prefill[queries // tokens + sequences, kv_heads](
        q,
        pool_layer,
        out,
        batch.query_starts,
        batch.context_starts,
        batch.block_tables,
        sequences,
        width,
        scale * LOG2_E,
        q.stride(0),
        pool_layer.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED=padded,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SEQUENCES=triton.next_power_of_2(max(_FEWEST_SEQUENCES, sequences)),
        QUERIES=tokens,
        CHANNELS=triton.next_power_of_2(max(16, head_dim)),
        TILE=tile,
        OPERAND=operand,
        WIDE=INTERPRETED,
        num_warps=warps,
        num_stages=stages,
    )


def _launch(head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Query rows, tokens of K and V, warps and stages of a tile.

    Sums `[rows, channels]` and scores `[rows, tokens]` stay in registers: 128 x 128 and 128 x 64 over 8 warps are 96
    a thread, of 185 to 220 in all. With two stages, compiled kernels take 64 KB of shared memory on SM80 and SM89,
    whose programs have 99 KB at least, and 96 KB on SM90, where the queries are there, too. Float32 is multiplied
    outside of tensor cores, where small tiles spill least.
    """
    if itemsize == 4:
        return (32, 32, 4, 1) if head_dim <= 128 else (16, 16, 4, 1)
    if head_dim <= 64:
        return 128, 64, 4, 2
    return (128, 64, 8, 2) if head_dim <= 128 else (64, 32, 8, 2)
