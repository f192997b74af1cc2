"""Memory of ranks that compute on the host."""

from __future__ import annotations

import contextlib
import mmap

from seesaw.core.errors import MemoryBudgetError

_HUGE_PAGE = 2 << 20
_POPULATE_WRITE = 23
"""Linux's number of the advice to `madvise`, since 5.14."""


def reserve(size: int, what: str, *, filled: bool = False) -> mmap.mmap:
    """`size` bytes of anonymous memory (above 0), in huge pages where the system has them: reading gigabytes, or in
    random order, spends much of its time on looking up small ones.

    Pages come at first touch or, with `filled`, now: the system clears them at a tenth of the speed of memory, and
    slower on a virtual machine. Raises `MemoryBudgetError`, which names `what`, if the system refuses the bytes.
    """
    try:
        region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryBudgetError(f"{what}: {size:,} bytes cannot be reserved: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        if size >= _HUGE_PAGE:
            region.madvise(mmap.MADV_HUGEPAGE)
    with contextlib.suppress(OSError):  # an older kernel: they come at first touch after all
        if filled:
            region.madvise(_POPULATE_WRITE)
    return region
