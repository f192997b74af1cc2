"""What `/proc` tells about processes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended. Tells a process from a later one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def users_of(namespaces: set[int]) -> set[int]:
    """Processes whose main thread is in one of the network namespaces, given by inode."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry.name}/ns/net").st_ino in namespaces:
                    found.add(int(entry.name))
    return found


def with_arguments(*wanted: str) -> dict[int, list[str]]:
    """Running processes whose arguments contain `wanted` one after another, with all their arguments."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{entry.name}/cmdline").read_bytes().decode(errors="replace")
                argv = arguments.rstrip("\0").split("\0")
                if any(argv[i : i + len(wanted)] == list(wanted) for i in range(len(argv))):
                    found[int(entry.name)] = argv
    return found
