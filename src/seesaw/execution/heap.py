"""Workers' heaps: kept, so that memory given back by one operator serves the next one as it is, filled with pages
before it is needed, and of huge ones."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""glibc's numbers of the parameters of `mallopt`."""
_POPULATE_WRITE = 23
"""Linux's number of the advice to `madvise`, since 5.14."""
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose heap is made of transparent huge pages, where the kernel gives such to those
    who ask; glibc before 2.35 and other C libraries ignore it.

    Weights and KV are gigabytes that are read from end to end at every step: by pages of 4 KiB, on a virtual machine
    above all, walking the page tables takes a good part of the time. Whoever sets the tunable has the last word.
    """
    tunables = environment.get(_TUNABLES, "")
    if _HUGE_PAGES in tunables:
        return dict(environment)
    return {**environment, _TUNABLES: f"{tunables}:{_HUGE_PAGES}=1".lstrip(":")}


def keep_heap() -> None:
    """Have the C library keep what is freed, and take large allocations from the heap as well (glibc only).

    By default an allocation of more than 32 MiB is mapped afresh and unmapped when freed, and the top of the
    heap is given back to the system. Then every activation and every re-sharded weight is paid for with page
    faults: on a virtual machine they run at a tenth of the speed of the memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 16 << 20)):
        if mallopt(parameter, value) != 1:
            logger.debug("mallopt(%d, %d) was refused", parameter, value)


def fill_heap(size: int) -> None:
    """Have the system put pages behind the next `size` bytes of a kept heap, which would come at first touch.

    So they are paid for once, at the start, and not by whoever happens to be first to use them: without it the first
    transitions of a job, which need more than the weights they begin with, take several times as long as the later
    ones. What the system refuses (memory that there is not, Linux before 5.14) comes at first touch as before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    place = libc.malloc(size)
    if place is None:
        return
    begin, end = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE, (place + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _POPULATE_WRITE):
        logger.debug("%d bytes of heap come at first touch: %s", size, os.strerror(ctypes.get_errno()))
    libc.free(place)
