"""`BlockPool`: the free list of one KV tier."""

from __future__ import annotations


class BlockPool:
    """Numbers the blocks of one tier (a replica's device pool or the host buffer) and hands them out.

    The pool knows what is free; who owns a block that is not is written in the owning `Sequence` alone.
    """

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._least_free = blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks in use."""
        return self.total - len(self._free)

    @property
    def peak(self) -> int:
        """Most blocks in use at any time so far."""
        return self.total - self._least_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. The caller has checked `free` and owns them until it releases them."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free of {self.total}"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self._least_free = min(self._least_free, len(self._free))
        return taken

    def take(self) -> int | None:
        """Take one block, which is the caller's until it releases it; None if none is free."""
        if not self._free:
            return None
        block = self._free.pop()
        if len(self._free) < self._least_free:
            self._least_free = len(self._free)
        return block

    def release(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(blocks))

    def check(self, owned: list[int]) -> None:
        """Assert that `owned` and the free list together are every block exactly once."""
        everything = sorted(owned + self._free)
        assert everything == list(range(self.total)), "a block leaked or is owned twice"
