"""`python -m tests.weights.compile_copies CAPABILITY`: compiles the copy kernel without a GPU."""

from __future__ import annotations

import sys

from seesaw.weights.triton_copies import copy_tiles
from tests.compile_triton import access_bytes

COUNTS = dict.fromkeys(("items", "tiles", "rows", "units", "source_row", "target_row"), "i32")


def main(capability: int) -> None:
    """For rows that 16 bytes divide and for odd ones, as they are and converted."""
    for source, target, words, columns, expected in (
        ("*i64", "*i64", 2, 256, [16, 16]),
        ("*i16", "*i16", 1, 1024, [2, 2]),
        ("*fp32", "*bf16", 4, 512, [16, 8]),
        ("*bf16", "*fp32", 4, 512, [8, 16]),
        ("*fp32", "*fp16", 1, 512, [4, 2]),
    ):
        found = access_bytes(
            copy_tiles,
            {"source": source, "target": target, **COUNTS},
            {"WORDS": words, "ROWS": 4, "COLUMNS": columns},
            aligned=("source", "target") if words > 1 else (),
            warps=8,
            capability=capability,
        )
        assert {found[0], found[-1]} == set(expected) and set(found) == set(expected), (source, target, found)


if __name__ == "__main__":
    main(int(sys.argv[1]))
