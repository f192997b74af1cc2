"""Triton kernels for sequences with one query: K and V into their slots, split-KV attention, and its combination.

Decode attention is bound by device memory: it does 2 operations for each element of K or V and query head of the
group, so the time aimed at is the bytes of K and V, read once, over the bandwidth. Three things serve it:

- All query heads of a group share one read. They are padded to 16 rows, the least that tensor cores take. That
  wastes most of the product's rows for small groups, and costs nothing: 16 rows are 16 operations a byte of 16-bit
  K or V, where tensor cores have time for 150 and more; sums without them would have to move every element through
  registers, with a reduction over threads for each token.
- Long sequences are cut into chunks, so that few sequences fill the device, and every program gets the same share
  of all tiles (LeanAttention), so that mixed lengths leave no SM idle. The share is worked out on the device by each
  program for itself, from the lengths of all sequences: one read of a few KB from the L2 cache and a prefix sum,
  about 2 µs against the hundreds that a full batch takes. No plan is kept that could be stale, nothing is asked of
  the host, and a CUDA graph that was captured for the widest block tables wastes nothing on short sequences, as a
  grid over (sequence, split) with early exits would.
- A chunk's bounds follow from its own sequence's length (and the size of the pool) alone, and each chunk is summed by
  itself; which program takes it has no influence. So a sequence's result is the same bit for bit in every batch.
  The price is that a sequence of several chunks passes its partial results through memory: 3 % of what is read for a
  group of 4 at 256 tokens a chunk, and they mostly stay in L2.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import torch
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
from seesaw.core.workspace import SPLITS

CHUNK = 256
"""Tokens of a chunk, at least: 64 KB of K and V at a head of 128, a few microseconds of one SM's bandwidth."""

_FEWEST_SEQUENCES = 64
_STORE_TILE = 1024
_COMBINE_TILE = 16


@triton.jit
def _store(
    k,
    v,
    pool,
    slots,
    k_stride,
    v_stride,
    block_stride,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`TILE` channels of one token, of all its heads. Bound by memory: a copy."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (channel < ROW) & (slot >= 0)
    head, within = channel // HEAD_DIM, channel % HEAD_DIM
    at = slot // BLOCK_SIZE * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    at += head * (BLOCK_SIZE * HEAD_DIM) + within
    keys = tl.load(k + token * k_stride + channel, mask=inside, other=0.0)
    tl.store(pool + at, keys.to(pool.dtype.element_ty), mask=inside)
    values = tl.load(v + token * v_stride + channel, mask=inside, other=0.0)
    tl.store(pool + ROW * BLOCK_SIZE + at, values.to(pool.dtype.element_ty), mask=inside)


@triton.jit
def _extent(
    query_starts,
    context_starts,
    sequence,
    inside,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """Length, first tile, tiles, tiles a chunk and chunks of sequences; none for those with other than one query.

    Chunks are as even as whole tiles can be.
    """
    row = tl.load(query_starts + sequence, mask=inside, other=0)
    end = tl.load(query_starts + sequence + 1, mask=inside, other=0)
    length = tl.load(context_starts + sequence, mask=inside, other=0) + 1
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    tiles = tl.where(end - row == 1, (length + TILE - 1) // TILE - first, 0)
    wanted = tl.maximum((tiles + CHUNK_TILES - 1) // CHUNK_TILES, 1)
    size = tl.maximum((tiles + wanted - 1) // wanted, 1)
    return row, length, first, tiles, size, (tiles + size - 1) // size


@triton.jit
def _chunk(
    q,
    keys,
    table,
    first,
    end,
    length,
    scale,
    block_stride,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attention of `q` `[M, D]` over the tiles `first .. end` of a sequence and KV head.

    Returns the mean of the values by their weights, `[M, D]`, and the binary logarithm of the weight of all, `[M]`.
    """
    channel = tl.arange(0, CHANNELS)
    real = channel < HEAD_DIM
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    mixed = tl.zeros([q.shape[0], CHANNELS], tl.float32)
    for tile in range(first, end):
        token = tile * TILE + tl.arange(0, TILE)
        inside = token < length
        if WINDOW > 0:
            inside &= token >= length - WINDOW
        at = token_offsets(table, token, inside, block_stride, BLOCK_SIZE, HEAD_DIM)
        # what lies in the pool beside the sequence may be anything, NaN too: it is not read
        k = tl.load(keys + at[None, :] + channel[:, None], mask=inside[None, :] & real[:, None], other=0.0)
        scores = multiply(q, k.to(q.dtype), WIDE) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        v = tl.load(
            keys + PLANE + at[:, None] + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        top, total, mixed = fold(scores, v.to(q.dtype), top, total, mixed, WIDE)
    return mixed / total[:, None], top + tl.log2(total)


@triton.jit
def _share(
    bases,
    query_starts,
    context_starts,
    sequences,
    WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """This program's share of a KV head's work, which it has in common with all programs of its row of the grid.

    Returns the sequence in which it begins, how much work and how many chunks the sequences before have, and from
    and to which amount of work it goes. Work is counted in tiles, and one more a chunk for its start. The chunks
    before each sequence are left in `bases` for `_combine`.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    every = tl.arange(0, SEQUENCES)
    exists = every < sequences
    _, _, _, _, sizes, counts = _extent(
        query_starts, context_starts, every, exists, WINDOW, TILE, CHUNK_TILES
    )
    if (program == 0) & (tl.program_id(1) == 0):
        tl.store(bases + every, tl.cumsum(counts, 0) - counts, mask=exists)
    works = counts * (sizes + 1)
    work = tl.sum(works, 0).to(tl.int64)
    begin = (work * program // programs).to(tl.int32)
    end = (work * (program + 1) // programs).to(tl.int32)
    before = exists & (tl.cumsum(works, 0) <= begin)
    sequence = tl.sum(before.to(tl.int32), 0)
    return (
        sequence,
        tl.sum(tl.where(before, works, 0), 0),
        tl.sum(tl.where(before, counts, 0), 0),
        begin,
        end,
    )


@triton.jit(do_not_specialize=["sequences", "table_width", "slots"])
def _decode(
    q,
    pool,
    out,
    partial,
    levels,
    bases,
    query_starts,
    context_starts,
    block_tables,
    sequences,
    table_width,
    slots,
    scale,
    q_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    OPERAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The chunks of one KV head that begin in this program's share of the work.

    A sequence of one chunk gets its result at once; of others, chunk c leaves the mean of its values in
    `partial[base + c]`, and the logarithm of its weight in `levels`.
    """
    sequence, position, base, begin, end = _share(
        bases, query_starts, context_starts, sequences, WINDOW, SEQUENCES, TILE, CHUNK_TILES
    )
    row, length, first, tiles, size, count = _extent(
        query_starts, context_starts, sequence, sequence < sequences, WINDOW, TILE, CHUNK_TILES
    )
    chunk = (begin - position + size) // (size + 1)
    position += chunk * (size + 1)

    group, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    heads = tl.program_id(1) * GROUP + group
    within = heads[:, None] * HEAD_DIM + channel[None, :]
    inside = (group < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    keys = pool + tl.program_id(1) * (BLOCK_SIZE * HEAD_DIM)
    while position < end:
        if chunk == count:
            base += count
            chunk -= count
            sequence += 1
            row, length, first, tiles, size, count = _extent(
                query_starts, context_starts, sequence, sequence < sequences, WINDOW, TILE, CHUNK_TILES
            )
        else:
            asking = tl.load(q + row.to(tl.int64) * q_stride + within, mask=inside, other=0.0).to(OPERAND)
            table = block_tables + sequence.to(tl.int64) * table_width
            start = first + chunk * size
            stop = tl.minimum(start + size, first + tiles)
            mean, level = _chunk(
                asking, keys, table, start, stop, length, scale, block_stride, KV_HEADS * BLOCK_SIZE * HEAD_DIM,
                HEAD_DIM, BLOCK_SIZE, WINDOW, CHANNELS, TILE, WIDE
            )  # fmt: skip
            if count == 1:
                at = out + row.to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) + within
                tl.store(at, mean.to(out.dtype.element_ty), mask=inside)
            else:
                fits = base + chunk < slots
                line = (base + chunk).to(tl.int64) * (KV_HEADS * GROUP)
                tl.store(partial + line * HEAD_DIM + within, mean, mask=inside & fits)
                tl.store(levels + line + heads, level, mask=(group < GROUP) & fits)
            chunk += 1
            position += size + 1


@triton.jit(do_not_specialize=["sequences"])
def _combine(
    out,
    partial,
    levels,
    bases,
    query_starts,
    context_starts,
    sequences,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The result of one sequence and query head from its chunks, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row, _, _, _, _, count = _extent(
        query_starts, context_starts, sequence, sequence < sequences, WINDOW, TILE, CHUNK_TILES
    )
    if count > 1:
        base = tl.load(bases + sequence)
        channel = tl.arange(0, CHANNELS)
        real = channel < HEAD_DIM
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        mixed = tl.zeros([CHANNELS], tl.float32)
        for first in range(0, count, PARTS):
            part = first + tl.arange(0, PARTS)
            line = (base + part).to(tl.int64) * Q_HEADS + head
            level = tl.load(levels + line, mask=part < count, other=float("-inf"))
            means = tl.load(
                partial + line[:, None] * HEAD_DIM + channel[None, :],
                mask=(part < count)[:, None] & real[None, :],
                other=0.0,
            )
            higher = tl.maximum(top, tl.max(level, 0))
            by = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(top - by)
            weights = tl.exp2(level - by)
            total = total * shrink + tl.sum(weights, 0)
            mixed = mixed * shrink + tl.sum(means * weights[:, None], 0)
            top = higher
        at = out + (row.to(tl.int64) * Q_HEADS + head) * HEAD_DIM + channel
        tl.store(at, (mixed / total).to(out.dtype.element_ty), mask=real)


def store_tokens(k: Tensor, v: Tensor, pool_layer: Tensor, slot_mapping: Tensor) -> None:
    """Put `k` and `v`, `[N, kv_heads, head_dim]`, into their slots of the pool; a negative slot takes nothing."""
    tokens, kv_heads, head_dim = k.shape
    if not tokens:
        return
    row = kv_heads * head_dim
    tile = min(_STORE_TILE, triton.next_power_of_2(row))
    _store[tokens, triton.cdiv(row, tile)](
        k,
        v,
        pool_layer,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        pool_layer.stride(0),
        ROW=row,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=pool_layer.shape[3],
        TILE=tile,
        num_warps=4,
    )


def chunk_tokens(pool_layer: Tensor, least: int = CHUNK) -> int:
    """Tokens of a chunk over this pool: so many that all that fits it makes `SPLITS` chunks at most."""
    tokens = pool_layer.shape[0] * pool_layer.shape[3]
    return max(least, 1 << (-(-tokens // SPLITS) - 1).bit_length())


def decode(
    q: Tensor,
    pool_layer: Tensor,
    batch: AttentionBatch,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    programs: int,
    chunk: int = CHUNK,
) -> None:
    """Attention of the sequences with one query, into their rows of `out` `[Q, q_heads * head_dim]`.

    `programs` is how many shall share the work, over all KV heads. Temporary memory: a float32 `[B + SPLITS,
    q_heads, head_dim + 1]` at most, as long as no block belongs to two sequences.
    """
    sequences, width = batch.block_tables.shape
    if not sequences or not q.shape[0]:
        return
    _, q_heads, head_dim = q.shape
    blocks, _, kv_heads, block_size, _ = pool_layer.shape
    tile = decode_tile(head_dim, pool_layer.dtype.itemsize)
    chunk = max(tile, chunk_tokens(pool_layer, chunk))
    longest = triton.cdiv(width * block_size, chunk)
    slots = min(sequences * longest, sequences + blocks * block_size // chunk) if longest > 1 else 0
    partial = torch.empty((slots, q_heads, head_dim), dtype=torch.float32, device=q.device)
    levels = torch.empty((slots, q_heads), dtype=torch.float32, device=q.device)
    bases = torch.empty(sequences, dtype=torch.int32, device=q.device)
    group = q_heads // kv_heads
    shape = {
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "CHANNELS": triton.next_power_of_2(max(16, head_dim)),
        "TILE": tile,
        "CHUNK_TILES": chunk // tile,
    }
    _decode[max(1, min(triton.cdiv(programs, kv_heads), sequences * longest)), kv_heads](
        q,
        pool_layer,
        out,
        partial,
        levels,
        bases,
        batch.query_starts,
        batch.context_starts,
        batch.block_tables,
        sequences,
        width,
        slots,
        scale * LOG2_E,
        q.stride(0),
        pool_layer.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_SIZE=block_size,
        SEQUENCES=triton.next_power_of_2(max(_FEWEST_SEQUENCES, sequences)),
        ROWS=triton.next_power_of_2(max(16, group)),
        OPERAND=operand_type(q.dtype, pool_layer.dtype),
        WIDE=INTERPRETED,
        num_warps=4,
        num_stages=2,
        **shape,
    )
    if longest > 1:
        _combine[sequences, q_heads](
            out,
            partial,
            levels,
            bases,
            batch.query_starts,
            batch.context_starts,
            sequences,
            Q_HEADS=q_heads,
            PARTS=_COMBINE_TILE,
            num_warps=2,
            **shape,
        )


def decode_tile(head_dim: int, itemsize: int) -> int:
    """Tokens of a tile: K and V of one are 32 KB at most.

    The next tile is on its way while one is computed (two stages): compiled, that takes 38 KB of shared memory and
    128 registers for each of 128 threads. So 4 programs are resident on an SM80 or SM90 and 2 on an SM86 or SM89,
    with 64 to 128 KB in flight, where latency times bandwidth are 10 to 30 KB an SM. A stage more would halve the
    programs, and those in other phases of their chunks hide a chunk's start as well.
    """
    tokens = 16384 // (head_dim * itemsize)
    return max(16, min(64, 1 << max(tokens, 1).bit_length() - 1))
