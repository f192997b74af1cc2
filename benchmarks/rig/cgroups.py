"""The control groups of a rig: one for commands and one for each rank, under a directory that names its keeper.

Both hierarchies are served: `cpu` of version 1 (quota in `cpu.cfs_quota_us`) and version 2 (`cpu.max`). A directory
whose keeper has ended is stale: the next rig, and `down`, remove it and end what still runs in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import RigError
from .processes import start_time
from .settings import Settings

_PREFIX = "seesaw-rig"
_DEFAULT_SHARES, _DEFAULT_WEIGHT = 1024, 100


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups with the `cpu` controller live."""

    root: Path
    version: int


def find_hierarchy(mounts: str | None = None) -> Hierarchy | None:
    """The hierarchy with the `cpu` controller; None where the machine shows none."""
    lines = (Path("/proc/self/mounts").read_text() if mounts is None else mounts).splitlines()
    for line in lines:
        _, where, kind, options, *_ = line.split()
        root = Path(where.replace("\\040", " "))
        if kind == "cgroup" and "cpu" in options.split(","):
            return Hierarchy(root, 1)
        if kind == "cgroup2":
            with contextlib.suppress(OSError):
                if "cpu" in (root / "cgroup.controllers").read_text().split():
                    return Hierarchy(root, 2)
    return None


@dataclass(frozen=True)
class RigGroups:
    """The directories of one rig."""

    hierarchy: Hierarchy
    root: Path

    @property
    def command(self) -> Path:
        """For what is run on the rig, without a quota; its workers move on to the groups of their ranks."""
        return self.root / "command"

    def rank(self, rank: int) -> Path:
        """For one rank."""
        return self.root / f"rank{rank}"

    def create(self, settings: Settings) -> None:
        """Make the directories and set quotas. Raises `RigError`."""
        try:
            self.root.mkdir()
            self._prepare_root(settings.ranks)
            self.command.mkdir()
            for rank in range(settings.ranks):
                self.rank(rank).mkdir()
                for name, value in quota_files(self.hierarchy.version, settings).items():
                    (self.rank(rank) / name).write_text(value)
        except OSError as error:
            raise RigError(
                f"cannot set up control groups under {self.root}: {error.strerror}; CPU quotas need root and a "
                "writable `cpu` controller"
            ) from None

    def _prepare_root(self, ranks: int) -> None:
        # The rig weighs as much against the rest of the machine as its ranks would without it.
        if self.hierarchy.version == 1:
            (self.root / "cpu.shares").write_text(str(_DEFAULT_SHARES * ranks))
            return
        with (self.hierarchy.root / "cgroup.subtree_control").open("w") as file:
            file.write("+cpu")
        (self.root / "cpu.weight").write_text(str(min(10_000, _DEFAULT_WEIGHT * ranks)))
        (self.root / "cgroup.subtree_control").write_text("+cpu")

    def processes(self) -> set[int]:
        """Process ids in any of the directories."""
        found: set[int] = set()
        for directory in (self.root, *_subdirectories(self.root)):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in (directory / "cgroup.procs").read_text().split()}
        return found

    def remove(self, *, seconds: float = 5.0) -> None:
        """End what runs in the groups and remove them; gives up silently after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.root.exists() and time.monotonic() < deadline:
            for pid in self.processes() - {os.getpid(), 0}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for directory in (*_subdirectories(self.root), self.root):
                with contextlib.suppress(OSError):  # busy until the kernel has reaped the last process
                    directory.rmdir()
            if self.root.exists():
                time.sleep(0.01)


def quota_files(version: int, settings: Settings) -> dict[str, str]:
    """Files of a rank's control group and what to write into them, in order."""
    if settings.quota_us is None:
        return {}
    if version == 2:
        return {"cpu.max": f"{settings.quota_us} {settings.period_us}"}
    return {"cpu.cfs_period_us": str(settings.period_us), "cpu.cfs_quota_us": str(settings.quota_us)}


def groups_of(hierarchy: Hierarchy, pid: int) -> RigGroups:
    """The directories of the rig that process `pid`, now running, keeps."""
    return RigGroups(hierarchy, hierarchy.root / f"{_PREFIX}-{_pid_namespace()}-{pid}-{start_time(pid)}")


def stale_groups(hierarchy: Hierarchy) -> Iterator[RigGroups]:
    """Rigs whose keeper has ended. Those of other process-id namespaces are left alone: nobody here can tell."""
    for directory in hierarchy.root.glob(f"{_PREFIX}-*"):
        parts = directory.name.removeprefix(_PREFIX + "-").split("-")
        if len(parts) != 3 or parts[0] != str(_pid_namespace()) or not parts[1].isdecimal():
            continue
        if str(start_time(int(parts[1]))) != parts[2]:
            yield RigGroups(hierarchy, directory)


def remove_stale(hierarchy: Hierarchy | None) -> int:
    """Remove what killed keepers left; returns how many rigs that was."""
    stale = [] if hierarchy is None else list(stale_groups(hierarchy))
    for groups in stale:
        groups.remove()
    return len(stale)


def _subdirectories(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
