"""Workers' heaps: kept, so that memory given back by one operator serves the next one as it is, and of huge pages."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""glibc's numbers of the parameters of `mallopt`."""
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
