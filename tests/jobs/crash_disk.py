"""A disk that remembers, after every operation, what a crash at that moment could leave behind.

Two states bound what a crash may leave: everything that was done, and only what was made durable (bytes by a
sync of their file, names by a sync of their folder). A third has the newest bytes torn in the middle.
"""

from __future__ import annotations

import os
from pathlib import Path

from seesaw.jobs.disk import Disk

State = dict[str, bytes]
"""Files of the folder by name."""


class CrashDisk(Disk):
    """Works on one folder. `states` are what crashes would leave, without repetitions, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[State] = []
        self.operations = 0
        self._durable: dict[int, bytes] = {}
        """Durable bytes by inode."""
        self._kept: dict[int, int] = {}
        """A descriptor of every inode that was ever seen, so that none is used twice."""
        self._names: dict[str, int] = {}
        """Durable names."""
        for path in folder.iterdir():
            inode = self._keep(path)
            self._durable[inode] = path.read_bytes()
            self._names[path.name] = inode
        self._note()

    def release(self) -> None:
        """Close what was kept."""
        for descriptor in self._kept.values():
            os.close(descriptor)

    def _keep(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._kept:
            self._kept[inode] = os.open(path, os.O_RDONLY)
            self._durable[inode] = b""
        return inode

    def _note(self, torn: dict[str, bytes] | None = None) -> None:
        self.operations += 1
        done = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        durable = {name: self._durable[inode] for name, inode in self._names.items()}
        for state in (done, durable, *([{**done, **torn}] if torn else [])):
            if state not in self.states[-4:]:
                self.states.append(state)

    def _name_of(self, descriptor: int) -> str:
        inode = os.fstat(descriptor).st_ino
        return next(path.name for path in self.folder.iterdir() if path.stat().st_ino == inode)

    def open(self, path: Path, *, create: bool = False) -> int:
        descriptor = super().open(path, create=create)
        self._keep(path)
        self._note()
        return descriptor

    def write(self, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        name = self._name_of(descriptor)
        before = (self.folder / name).read_bytes()[:offset]
        super().write(descriptor, data, offset)
        self._note({name: before + bytes(data)[: len(data) // 2]})

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size)
        self._note()

    def sync(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        self._durable[inode] = (self.folder / self._name_of(descriptor)).read_bytes()
        self._note()

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._note()

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note()

    def sync_folder(self, folder: Path) -> None:
        self._names = {path.name: self._keep(path) for path in self.folder.iterdir()}
        self._note()


class LazyDisk(Disk):
    """A disk that promises nothing, for the runs after a crash."""

    def sync(self, descriptor: int) -> None:
        return

    def sync_folder(self, folder: Path) -> None:
        return
