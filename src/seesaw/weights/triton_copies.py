"""Boxes of weights from host memory into a GPU's, in one hop, by a Triton kernel.

The kernel reads host memory that is registered with the device (`device.registration`): of a column-parallel shard
exactly its part of every row crosses the link, and elements are converted on their way. It is bound by the link.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803 - Triton writes constants of a kernel in capitals

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 16
"""Programs of a copy, of a tile each in flight, 256 KiB in all: enough for a PCIe Gen5 link (see `kv.triton_copies`),
while all other SMs are left to computation."""
_TILE_BYTES = 16 << 10
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["items", "tiles", "rows", "units", "source_row", "target_row"])
def copy_tiles(
    source,
    target,
    items,
    tiles,
    rows,
    units,
    source_row,
    target_row,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy `items` tiles of `ROWS` times `COLUMNS` words, `tiles` of them side by side; program p of P takes items p,
    p + P, and so on. A row has `units` of `WORDS` words, and strides count these units too."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = (item // tiles) * ROWS + tl.arange(0, ROWS)
        word = (item % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (word < units * WORDS)[None, :]
        read = source + (row.to(tl.int64) * source_row)[:, None] * WORDS + word[None, :]
        write = target + (row.to(tl.int64) * target_row)[:, None] * WORDS + word[None, :]
        tl.store(write, tl.load(read, mask=inside).to(target.dtype.element_ty), mask=inside)


def copy_rows(source: Tensor, target: Tensor, *, programs: int = PROGRAMS) -> None:
    """Copy `source` to `target`, both `[rows, columns]` with elements of a row side by side, converting their type.

    `source` is a CPU tensor whose memory is registered, `target` is on the device. To be converted, elements must
    lie at multiples of their size. Runs on the current stream, by up to `programs` programs, and waits for nothing.
    Raises `ValueError` if the memory is not registered.
    """
    rows, columns = target.shape
    assert source.shape == target.shape, (source.shape, target.shape)
    assert columns < 2 or source.stride(1) == target.stride(1) == 1, (source.stride(), target.stride())
    if not rows or not columns:
        return
    source_row, target_row = (side.stride(0) if rows > 1 else columns for side in (source, target))
    places = [side.data_ptr() for side in (source, target)]
    size = max(source.element_size(), target.element_size())
    read: Any = source
    write: Any = target
    if source.dtype == target.dtype:  # bits as they are, in the widest words that divide everything
        unit = math.gcd(16, *(n * size for n in (columns, source_row, target_row)), *places)
        word = min(unit, 8)
        read, write = (triton.reinterpret(side, _WORDS[word]) for side in (source, target))
        columns, source_row, target_row = (n * size // word for n in (columns, source_row, target_row))
        words, size = unit // word, word
    else:
        sizes = [side.element_size() for side in (source, target)]
        assert not any(place % each for place, each in zip(places, sizes, strict=True)), places
        places = [place // each for place, each in zip(places, sizes, strict=True)]
        words = math.gcd(16 // size, columns, source_row, target_row, *places)
    wide = min(triton.next_power_of_2(columns), _TILE_BYTES // size)
    high = min(triton.next_power_of_2(rows), _TILE_BYTES // size // wide)
    tiles = -(-columns // wide)
    items = tiles * -(-rows // high)
    assert max(items, columns + wide) < 1 << 31, (items, columns)
    with torch.cuda.device_of(target):  # type: ignore[no-untyped-call] # a thread of its own starts on device 0
        copy_tiles[(min(programs, items),)](
            read,
            write,
            items,
            tiles,
            rows,
            columns // words,
            source_row // words,
            target_row // words,
            WORDS=words,
            ROWS=high,
            COLUMNS=wide,
            num_warps=8 if wide * high * size >= _TILE_BYTES // 2 else 1,
        )
