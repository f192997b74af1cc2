"""Products whose sums over ranks travel while they are computed: by which columns, for engine and twin."""

from __future__ import annotations

from functools import lru_cache

MESSAGE_BYTES = 16 << 10
"""What a rank sends another of a part, at least: 130 µs at 1 Gbit/s, where a part costs some 20 µs more.

Two ranks send each other the part; n send each other a share of it, and the sum of a share: 2/n of the part.
"""
MOST_PARTS = 4
"""What is left when the product is done is a fourth then; more parts would hide little more."""
_GRAIN = 64
"""Columns of a part are a multiple of this, for the tiles of kernels."""


@lru_cache(maxsize=4096)
def part_bounds(rows: int, columns: int, item_bytes: int, members: int) -> tuple[int, ...]:
    """The columns at which parts of a product `[rows, columns]` begin, and `columns`; `(0, columns)` is one part.

    The same on all `members`, the ranks that add it up.
    """
    parts = min(MOST_PARTS, 2 * rows * columns * item_bytes // (members * MESSAGE_BYTES))
    if parts < 2:
        return (0, columns)
    width = -(-columns // (parts * _GRAIN)) * _GRAIN
    return (*range(0, columns, width), columns)


def left_of_sum(product: float, whole: float, parts: int) -> float:
    """Seconds that a sum of `whole` seconds takes beyond its product, which takes `product`.

    All but the first part of the product and the last of the sum can go on at the same time.
    """
    return whole - (1 - 1 / parts) * min(product, whole)
