"""`IdIndex`: which row ids have been seen, and where, in little memory."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from itertools import repeat

_SHARDS = 64
_FIRST_SLOTS = 64


class _Shard:
    """Open-addressing table of 128-bit digests; a position of 0 marks an empty slot."""

    __slots__ = ("_high", "_low", "_places", "_used")

    def __init__(self) -> None:
        self._used = 0
        self._allocate(_FIRST_SLOTS)

    def _allocate(self, slots: int) -> None:
        self._high = array("Q", repeat(0, slots))
        self._low = array("Q", repeat(0, slots))
        self._places = array("Q", repeat(0, slots))

    def add(self, high: int, low: int, position: int) -> int | None:
        """Insert, or return the position already there."""
        highs, lows, places = self._high, self._low, self._places
        mask = len(places) - 1
        slot = low & mask
        while places[slot]:
            if lows[slot] == low and highs[slot] == high:
                return places[slot]
            slot = (slot + 1) & mask
        highs[slot], lows[slot], places[slot] = high, low, position
        self._used += 1
        if 3 * self._used > 2 * len(places):
            self._grow()
        return None

    def _grow(self) -> None:
        high, low, places = self._high, self._low, self._places
        self._used = 0
        self._allocate(2 * len(places))
        for h, l_, position in zip(high, low, places, strict=True):
            if position:
                self.add(h, l_, position)


class IdIndex:
    """The ids of a job and where they stand: some 36 to 72 bytes per id, whatever the length of the ids.

    Ids are told apart by a 128-bit digest; among 10 million, two collide with a probability below 1e-24.
    Many small tables, so that none takes noticeable time to grow.
    """

    def __init__(self) -> None:
        self._shards = [_Shard() for _ in range(_SHARDS)]

    def add(self, row_id: str, position: int) -> int | None:
        """Note that `row_id` stands at `position` (from 1, below 2^64); returns where it stood before, if it did."""
        digest = blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        high, low = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
        return self._shards[high % _SHARDS].add(high, low, position)
