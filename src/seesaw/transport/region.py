"""How large the region of memory is that the ranks of one host share; knows no torch, so that a preflight can ask."""

from __future__ import annotations

SLOT_BYTES = 512 << 10
"""An outbox slot: the chunk of a large all-reduce. Two slots per rank; they stay in the caches."""

BLOCK_BYTES = (256 << 10, 16 << 10)
BLOCKS = (1024, 4096)
"""Per channel, what a ring holds: 256 MiB of hidden states, 64 MiB of sampled tokens, per ordered pair of ranks.

A message takes whole blocks, the lowest that are free, so only as many pages are ever touched as were under way
at one time: the rest of the region costs address space alone.
"""

OUTBOX_BYTES = 2 * SLOT_BYTES
"""Of each rank, all of it touched."""
RING_BYTES = sum(count * size for count, size in zip(BLOCKS, BLOCK_BYTES, strict=True))
"""Of each (source, destination), a rank and itself among them; little of it is ever touched."""


def region_bytes(world: int) -> int:
    """Address space of the region of `world` ranks, but for its tables of counters (below a hundredth of it)."""
    return world * (OUTBOX_BYTES + world * RING_BYTES) if world > 1 else 0
