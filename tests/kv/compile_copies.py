"""`python -m tests.kv.compile_copies CAPABILITY`: compiles the copy kernel without a GPU."""

from __future__ import annotations

import sys

from seesaw.kv.triton_copies import copy_tiles
from tests.compile_triton import access_bytes

WORDS = {1: "*i8", 2: "*i16", 4: "*i32", 8: "*i64"}
TILE_BYTES = 16 << 10


def main(capability: int) -> None:
    """For slabs that 16 bytes divide and for odd ones; strides of big pools are 64-bit."""
    counts = {"items": "i32", "slabs": "i32", "units": "i32", "near_slab": "i32", "far_slab": "i32"}
    strides = {"near_block": "i64", "far_block": "i64"}
    for unit in (2, 16):
        word = min(unit, 8)
        types = {"near": WORDS[word], "far": WORDS[word], "table": "*i64", **counts, **strides}
        # where the unit is 16 bytes the bases are multiples of it, and nothing more is known of the strides
        aligned = ("near", "far", "table") if unit == 16 else ("table",)
        for to_host in (True, False):
            found = access_bytes(
                copy_tiles,
                types,
                {"WORDS": unit // word, "TILE": TILE_BYTES // word, "TO_HOST": to_host},
                aligned=aligned,
                warps=8,
                capability=capability,
            )
            numbers, moves = found[:2], found[2:]
            assert numbers == [8, 8] and set(moves) == {unit}, (unit, to_host, found)
            # a thread moves its share of the tile and nothing twice
            assert len(moves) == 2 * TILE_BYTES // (8 * 32 * unit), (unit, len(moves))
    # Triton makes constants of arguments that are 1: a slab of a byte
    single = {name: 1 for name in (*counts, *strides) if name != "items"}
    pointers = {"near": "*i8", "far": "*i8", "table": "*i64", "items": "i32"}
    single.update(WORDS=1, TILE=1, TO_HOST=True)
    assert access_bytes(copy_tiles, pointers, single, warps=1, capability=capability) == [8, 8, 1, 1]


if __name__ == "__main__":
    main(int(sys.argv[1]))
