"""What this machine has and allows: memory, control groups, limits of a process."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_NO_LIMIT = 1 << 60
"""Control groups of version 1 write a number near 2^63 for none."""

LIMITS = {
    "-v": resource.RLIMIT_AS,
    "-l": resource.RLIMIT_MEMLOCK,
    "-n": resource.RLIMIT_NOFILE,
    "-f": resource.RLIMIT_FSIZE,
}
"""By the option of `ulimit` that shows them; in bytes, or files."""


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """What a control group lets its processes take."""

    path: str
    limit: int
    room: int
    """Bytes still to be had; page cache that can be dropped counts as room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the checks go by."""

    available: int
    """Bytes of memory that can be had without swapping."""
    group: GroupLimit | None = None
    """The tightest memory limit of this process's control groups."""
    overcommit: int = 0
    """`vm.overcommit_memory`; 2 means that memory must be backed when it is reserved."""
    commit_room: int | None = None
    """Bytes that can still be reserved under `overcommit` 2."""
    limits: Mapping[str, int | None] = field(default_factory=dict)
    """By the keys of `LIMITS`; None is unlimited."""


def read_machine(root: Path = Path("/")) -> Machine:
    """This machine, with what stands in files read below `root`."""
    meminfo = _numbers(root / "proc/meminfo", 1024)
    overcommit = _read(root / "proc/sys/vm/overcommit_memory").strip()
    commit = meminfo.get("CommitLimit:"), meminfo.get("Committed_AS:")
    return Machine(
        available=meminfo.get("MemAvailable:", psutil.virtual_memory().available),
        group=group_limit(root),
        overcommit=int(overcommit) if overcommit.isdigit() else 0,
        commit_room=None if None in commit else max(0, commit[0] - commit[1]),  # type: ignore[operator]
        limits={name: soft_limit(number) for name, number in LIMITS.items()},
    )


def available_memory() -> int:
    """Bytes that this process and its ranks can take: of the machine, and of its control groups."""
    machine = int(psutil.virtual_memory().available)
    group = group_limit()
    return machine if group is None else min(machine, group.room)


def soft_limit(number: int) -> int | None:
    """The limit that holds now; None for none."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def group_limit(root: Path = Path("/")) -> GroupLimit | None:
    """The memory limit that leaves least room, of all control groups that this process is in; None if none is set."""
    limits = [limit for folder in _groups(root) if (limit := group_limit_of(folder)) is not None]
    return min(limits, key=lambda limit: limit.room, default=None)


def group_limit_of(folder: Path) -> GroupLimit | None:
    """The memory limit of the control group at `folder`, of either version."""
    for limit_file, usage_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < _NO_LIMIT:
            droppable = _numbers(folder / "memory.stat").get(cache, 0)
            room = int(limit) - max(0, int(usage) - droppable)
            return GroupLimit(str(folder), int(limit), max(0, room))
    return None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process that may limit memory, and of those above them.

    In a container the path may be one of the host's, which cannot be seen: then the mount's own folder is ours.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            inside = mount / path.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(mount))


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """Lines of `name number` in units of `unit` bytes."""
    found = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(" ")
        value = rest.split()
        if value and value[0].isdigit():
            found[name] = int(value[0]) * unit
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
