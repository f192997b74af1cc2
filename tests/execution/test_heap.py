"""Workers' heaps are kept, and of huge pages, where C library and kernel have them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seesaw.execution.fork_server import ForkServer
from seesaw.execution.heap import with_huge_pages

TUNABLES = "GLIBC_TUNABLES"
HUGE = "glibc.malloc.hugetlb=1"
ALLOCATES = """
import ctypes
from seesaw.execution.heap import keep_heap
keep_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
place = libc.malloc(ctypes.c_size_t(64 << 20)) + (8 << 20)
inside = False
for line in open("/proc/self/smaps"):
    head = line.split()[0]
    if "-" in head and not head.endswith(":"):
        start, end = (int(side, 16) for side in head.split("-"))
        inside = start <= place < end
    elif inside and head == "VmFlags:":
        print("hg" in line.split())
"""

FAULTS = """
import ctypes, resource, sys
from seesaw.execution.heap import keep_heap
keep_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)
size = int(sys.argv[2])
if sys.argv[1] == "kept":  # used once, and given back
    place = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(place, 1, size)
    libc.free(place)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    ctypes.memset(libc.malloc(ctypes.c_size_t(size // 4 - 64)), 1, size // 4 - 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, size: int) -> int:
    """Page faults of memory that is first used, `size` bytes of it."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library has no such heap")
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, how, str(size)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_what_is_set_already_stays() -> None:
    assert with_huge_pages({"A": "b"}) == {"A": "b", TUNABLES: HUGE}
    assert with_huge_pages({TUNABLES: "glibc.malloc.check=3"}) == {TUNABLES: f"glibc.malloc.check=3:{HUGE}"}
    refused = {TUNABLES: "glibc.malloc.hugetlb=0"}
    assert with_huge_pages(refused) == refused


def test_large_memory_of_a_kept_heap_asks_for_huge_pages() -> None:
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("the C library has no huge pages")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has no huge pages")
    for environment, wanted in ((with_huge_pages(os.environ), "True"), (dict(os.environ), "False")):
        run = subprocess.run(
            [sys.executable, "-c", ALLOCATES], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == [wanted]


def test_workers_are_forked_from_a_process_with_huge_pages() -> None:
    server = ForkServer()
    try:
        place, environment = Path(f"/proc/{server._process.pid}/environ"), ""
        deadline = time.monotonic() + 10
        while not environment and time.monotonic() < deadline:  # the kernel shows it a moment after the start
            environment = place.read_text()
    finally:
        server.close()
    assert HUGE in environment


def test_memory_given_back_has_its_pages_still() -> None:
    assert faults("kept", 64 << 20) < faults("fresh", 64 << 20) / 5
