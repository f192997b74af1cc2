"""`Disk`: the operations by which a job changes files, and the names of those files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seesaw.core.errors import JobError


class Disk:
    """Every change that a job makes to a file goes through one of these, so that a test can stop at each.

    A change is durable once its file was synced; a new, renamed or removed name, once its folder was.
    All raise `OSError`.
    """

    def open(self, path: Path, *, create: bool = False) -> int:
        """A descriptor for reading and writing; `create` makes an empty file where there is none."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)

    def write(self, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` from byte `offset` on."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Make the bytes of a file durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor; syncs nothing."""
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, over what stands under `target`."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a name, if it is there."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_whole(self, path: Path, data: bytes) -> None:
        """Replace the content of a small file: after a crash it holds the old or the new content, whole."""
        temporary = path.with_name(path.name + ".new")
        descriptor = self.open(temporary, create=True)
        try:
            self.truncate(descriptor, 0)
            self.write(descriptor, data, 0)
            self.sync(descriptor)
        finally:
            self.close(descriptor)
        self.replace(temporary, path)
        self.sync_folder(path.parent)


DISK = Disk()
"""The real one."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `JobError` that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        room = "; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise JobError(f"{path}: cannot be written ({error.strerror}){room}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The same for reading."""
    try:
        yield
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from error


def part_path(path: Path) -> Path:
    """Where the lines of `path` stand until the job is done."""
    return path.with_name(path.name + ".part")


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if it is not there. Raises `JobError`."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files of a job. `OUTPUT` and `ERRORS` are what the user asked for, the others stand beside them."""

    output: Path
    errors: Path

    @property
    def answers_part(self) -> Path:
        """Lines of answered rows, in the order in which they were finished."""
        return part_path(self.output)

    @property
    def errors_part(self) -> Path:
        """Lines of failed rows, likewise."""
        return part_path(self.errors)

    @property
    def journal(self) -> Path:
        """What stands in the two, row by row."""
        return self.output.with_name(self.output.name + ".journal")

    @property
    def manifest(self) -> Path:
        """What the job was asked for and how far it is."""
        return self.output.with_name(self.output.name + ".manifest.json")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those of all files."""
        return tuple(dict.fromkeys((self.errors.parent, self.output.parent)))
