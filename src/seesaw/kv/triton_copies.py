"""Copies of KV slabs between a GPU's pool and host memory in one hop, by a Triton kernel.

The kernel reads device memory and writes host memory that is registered with the device
(`device.registration`), or the other way round: scattered slabs of any size move as if they were one large transfer,
without a buffer between and without a call per slab. It is bound by the link to the host.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 - Triton writes constants of a kernel in capitals

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 16
"""Programs of a copy, each on some SM; all other SMs, and most of these, are left to computation.

By Little's law a link is full while bandwidth times latency is in flight. PCIe Gen5 x16 carries about 55 GB/s, and
a read of host memory takes about 1.5 us, behind 0.5 us for the block numbers: 85 % of the link is 47 GB/s * 2 us =
94 KB. Gen4 (26 GB/s) takes 44 KB. A program has a tile of 8 KiB (a small slab) to 16 KiB in flight, so 16 programs
have 128 to 256 KiB. Writes to the host are posted, and need less.
"""
_TILE_BYTES = 16 << 10
_THREAD_BYTES = 64  # four accesses of 16 bytes, in flight at once
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["items"])
def copy_tiles(
    near,
    far,
    table,
    items,
    slabs,
    units,
    near_block,
    near_slab,
    far_block,
    far_slab,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    TO_HOST: tl.constexpr,
):
    """Copy `items` tiles of `TILE` words; sizes and strides count units of `WORDS` words.

    Tile by tile, slab by slab, pair by pair; program p of P takes items p, p + P, and so on.
    """
    tiles = tl.cdiv(units * WORDS, TILE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        piece = item // tiles
        pair = table + 2 * (piece // slabs).to(tl.int64)
        slab = (piece % slabs).to(tl.int64)
        word = (item % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = word < units * WORDS
        near_at = near + (tl.load(pair) * near_block + slab * near_slab) * WORDS + word
        far_at = far + (tl.load(pair + 1) * far_block + slab * far_slab) * WORDS + word
        if TO_HOST:
            tl.store(far_at, tl.load(near_at, mask=inside), mask=inside)
        else:
            tl.store(near_at, tl.load(far_at, mask=inside), mask=inside)


def copy_slabs(near: Tensor, far: Tensor, table: Tensor, to_host: bool, *, programs: int = PROGRAMS) -> None:
    """Copy slabs of the blocks in `table` from `near` to `far` (`to_host`) or back, bit for bit.

    `near` is `[device blocks, layers, 2, heads, block_size, head_dim]`, on the device, `far` likewise with host
    blocks, a CPU tensor whose memory is registered; both may be views, of layers and of heads: what they share
    is `[heads, block_size, head_dim]` contiguous, and K and V of a layer as far apart as V and the next layer's
    K. `table` is int64 `[n, 2]` on the device, contiguous: (device block, host block). Block numbers are not
    checked here, and no block may be written twice.

    Runs on the current stream, by up to `programs` programs, and waits for nothing. Raises `ValueError` if the
    memory of `far` is not registered.
    """
    item_bytes, layers = near.element_size(), near.shape[1]
    slab = near.shape[3:].numel() * item_bytes
    assert near.shape[1:] == far.shape[1:] and near.dtype == far.dtype, (near.shape, far.shape)
    for side in (near, far):
        assert side.stride()[3:] == (side.shape[4] * side.shape[5], side.shape[5], 1), side.stride()
        assert layers == 1 or side.stride(1) == 2 * side.stride(2), side.stride()
    assert table.dtype == torch.int64 and table.shape[1:] == (2,) and table.is_contiguous(), table.shape
    assert table.device == near.device, (table.device, near.device)
    near_block, near_slab = near.stride(0) * item_bytes, near.stride(2) * item_bytes
    far_block, far_slab = far.stride(0) * item_bytes, far.stride(2) * item_bytes
    slabs = 2 * layers
    if slab == near_slab == far_slab:  # both sides hold all that lies between: one long slab
        slab, slabs = slab * slabs, 1
    if not len(table) or not slab:
        return
    unit = math.gcd(16, slab, near_block, near_slab, far_block, far_slab, near.data_ptr(), far.data_ptr())
    word = min(unit, 8)
    tile = min(_TILE_BYTES, triton.next_power_of_2(slab))
    items = len(table) * slabs * -(-slab // tile)
    assert items < 1 << 31, items
    with torch.cuda.device_of(near):  # type: ignore[no-untyped-call] # a thread of its own starts on device 0
        copy_tiles[(min(programs, items),)](
            triton.reinterpret(near, _WORDS[word]),
            triton.reinterpret(far, _WORDS[word]),
            table,
            items,
            slabs,
            slab // unit,
            near_block // unit,
            near_slab // unit,
            far_block // unit,
            far_slab // unit,
            WORDS=unit // word,
            TILE=tile // word,
            TO_HOST=to_host,
            num_warps=max(1, min(8, tile // (32 * _THREAD_BYTES))),
        )
