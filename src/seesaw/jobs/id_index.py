"""`IdIndex`: which row ids have been seen, and where, in little memory."""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np

_DIGEST_BYTES = 12
_PLACE_BYTES = 5
_ENTRY_BYTES = _DIGEST_BYTES + _PLACE_BYTES
_ENTRY = np.dtype([("bits", "<u4"), ("rest", f"V{_ENTRY_BYTES - 4}")])
_bits = struct.Struct("<I").unpack_from
_FIRST_BUCKETS = 16
_ENTRIES = 64
"""In a bucket, on average: few enough to be searched quickly, enough to outweigh what a bucket itself takes."""


class IdIndex:
    """The ids of a job and where they stand: some 20 bytes per id, whatever the length of the ids.

    Ids are told apart by a 96-bit digest; that any two of 10 million collide has a probability below 1e-15.
    The digests stand in buckets, as many as their lowest bits tell apart. As ids come, one bucket at a time is split
    in two by the next bit (linear hashing), so that there is never a pause, nor a second copy of the table.
    """

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(_FIRST_BUCKETS)]
        self._mask = _FIRST_BUCKETS - 1
        """Of the bits by which all buckets are told apart."""
        self._split = 0
        """Buckets that have been split by the bit above."""
        self._room = _FIRST_BUCKETS * _ENTRIES
        """Ids to come until another one is split."""

    def add(self, row_id: str, position: int) -> int | None:
        """Note that `row_id` stands at `position` (below 2^40); returns where it stood before, if it did."""
        digest = blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
        (bits,) = _bits(digest)
        number = bits & self._mask
        if number < self._split:
            number = bits & (2 * self._mask + 1)
        bucket = self._buckets[number]
        at = bucket.find(digest)
        while at >= 0:
            if at % _ENTRY_BYTES == 0:  # else it is found across two entries
                return int.from_bytes(bucket[at + _DIGEST_BYTES : at + _ENTRY_BYTES], "little")
            at = bucket.find(digest, at + 1)
        bucket += digest + position.to_bytes(_PLACE_BYTES, "little")
        self._room -= 1
        if not self._room:
            self._split_next()
        return None

    def _split_next(self) -> None:
        """Move the entries of one bucket whose next bit is set into a new one."""
        bit = self._mask + 1
        entries = np.frombuffer(self._buckets[self._split], _ENTRY)
        moved = entries["bits"] & bit != 0
        self._buckets.append(bytearray(entries[moved].tobytes()))
        self._buckets[self._split] = bytearray(entries[~moved].tobytes())
        self._room = _ENTRIES
        self._split += 1
        if self._split == bit:
            self._mask, self._split = 2 * bit - 1, 0
