"""Which parts of a stretch of memory are free: tensors of a few sizes come and go at every transition. No torch."""

from __future__ import annotations

from bisect import bisect_left

_ALIGNMENT = 64
_LARGE = 16
"""Tensors of this part of the whole or more are laid from the end."""


class Arena:
    """Places in `size` bytes, rounded up to a multiple of 64.

    Takes the smallest gap that is large enough: from its beginning, for a large tensor from its end. First fit wastes
    more, and so does best fit where large tensors lie among small ones (an embedding among layers). How much a plan's
    transitions need, `rehearsal` finds out.
    """

    def __init__(self, size: int) -> None:
        self.size = _rounded(size)
        self._gaps = [(0, self.size)]
        """Beginnings and sizes, by beginning; no two touch."""

    @property
    def free(self) -> int:
        """Bytes that are not taken."""
        return sum(size for _, size in self._gaps)

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes from now on, a multiple of 64; None if no gap is large enough."""
        size = _rounded(size)
        fitting = [(gap, begin) for begin, gap in self._gaps if gap >= size]
        if not fitting:
            return None
        gap, begin = min(fitting)
        left = [(begin + size, gap - size)] if gap > size else []
        place = begin
        if left and size * _LARGE >= self.size:
            left, place = [(begin, gap - size)], begin + gap - size
        index = bisect_left(self._gaps, (begin, gap))
        self._gaps[index : index + 1] = left
        return place

    def give(self, offset: int, size: int) -> None:
        """Give back what `take(size)` found at `offset`."""
        begin, end = offset, offset + _rounded(size)
        first = last = bisect_left(self._gaps, (begin,))
        assert first == len(self._gaps) or end <= self._gaps[first][0], (offset, size, self._gaps[first])
        if first and sum(self._gaps[first - 1]) >= begin:
            assert sum(self._gaps[first - 1]) == begin, (offset, size, self._gaps[first - 1])
            first -= 1
            begin = self._gaps[first][0]
        if last < len(self._gaps) and self._gaps[last][0] == end:
            end = sum(self._gaps[last])
            last += 1
        self._gaps[first:last] = [(begin, end - begin)]


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
