"""Where finished lines go: into the files of a job with their journal, or straight to standard output."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import BinaryIO, Protocol
from zlib import crc32

from seesaw.core.errors import JobError
from seesaw.jobs.check import write_rows
from seesaw.jobs.disk import DISK, Disk, JobFiles, writing
from seesaw.jobs.journal import (
    Ends,
    Header,
    Journal,
    Kind,
    Records,
    Replay,
    continue_journal,
    start_journal,
)


class LineStore(Protocol):
    """Takes the lines of finished rows; used by one thread. Methods raise `JobError`."""

    @property
    def waiting(self) -> int:
        """Bytes of lines that are not safe yet."""
        ...

    @property
    def safe(self) -> int:
        """Rows that were added and are safe."""
        ...

    def add(self, kind: Kind, number: int, digest: int, line: bytes) -> None:
        """Take the line of a row, `\\n` included."""
        ...

    def sync(self) -> None:
        """Make all that was added safe."""
        ...

    def close(self) -> None:
        """Let go of the files, as they are. May be called twice."""
        ...


class _LineFile:
    """A file of lines that grows. It is created with its first line."""

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        self.path, self.size, self._disk = path, size, disk
        self.buffer = bytearray()
        self._descriptor: int | None = None

    def open(self) -> None:
        """Make the file; what stands behind its end is cut off."""
        with writing(self.path):
            new = not self.path.exists()
            self._descriptor = self._disk.open(self.path, create=True)
            if os.fstat(self._descriptor).st_size > self.size:
                self._disk.truncate(self._descriptor, self.size)
            if new:
                self._disk.sync_folder(self.path.parent)

    def sync(self) -> None:
        """Make the buffered lines durable."""
        if not self.buffer:
            return
        if self._descriptor is None:
            self.open()
        assert self._descriptor is not None
        with writing(self.path):
            self._disk.write(self._descriptor, self.buffer, self.size)
            self._disk.sync(self._descriptor)
        self.size += len(self.buffer)
        self.buffer.clear()

    def close(self) -> None:
        if self._descriptor is not None:
            self._disk.close(self._descriptor)
            self._descriptor = None


class JobStore:
    """The files of a job that runs: lines of answers and of errors, and the journal, which is locked.

    `sync` first makes the lines durable, then the group of their rows in the journal.
    """

    def __init__(
        self, files: JobFiles, journal: Journal, descriptor: int, ends: Ends, disk: Disk = DISK
    ) -> None:
        self._journal, self._descriptor, self._disk = journal, descriptor, disk
        self._answers = _LineFile(files.answers_part, ends.answers, disk)
        self._errors = _LineFile(files.errors_part, ends.errors, disk)
        self._rows: list[tuple[Kind, int, int, int, int, int]] = []
        self._closed = False
        self.safe = 0

    def open(self) -> None:
        """Make the file of answers, and cut off what the journal does not know of. Raises `JobError`."""
        self._answers.open()
        if self._errors.path.exists():
            self._errors.open()

    @property
    def ends(self) -> Ends:
        """Bytes of lines that are safe."""
        return Ends(self._answers.size, self._errors.size)

    @property
    def waiting(self) -> int:
        """See `LineStore`."""
        return len(self._answers.buffer) + len(self._errors.buffer)

    def add(self, kind: Kind, number: int, digest: int, line: bytes) -> None:
        """See `LineStore`."""
        file = self._answers if kind is Kind.ANSWER else self._errors
        offset = file.size + len(file.buffer)
        self._rows.append((kind, number, offset, len(line), crc32(line), digest))
        file.buffer += line

    def sync(self) -> None:
        """See `LineStore`."""
        if not self._rows:
            return
        crc = crc32(self._errors.buffer, crc32(self._answers.buffer))
        self._answers.sync()
        self._errors.sync()
        rows = b"".join(self._journal.row(*row) for row in self._rows)
        self._journal.commit(rows, self.ends, crc)
        self.safe += len(self._rows)
        self._rows.clear()

    def close(self) -> None:
        """See `LineStore`."""
        self.close_lines()
        if not self._closed:
            self._closed = True
            self._disk.close(self._descriptor)

    def close_lines(self) -> None:
        """Let go of all but the journal."""
        self._answers.close()
        self._errors.close()


class StreamStore:
    """Standard output: lines are there as soon as they are finished, and nowhere else.

    Error lines go to a file that stands under its name from the start if one is given.
    """

    def __init__(self, errors: Path | None, *, output: BinaryIO | None = None) -> None:
        self._output = output or sys.stdout.buffer
        self._errors_path = errors
        self._errors: BinaryIO | None = None
        self._added = 0
        self.waiting = 0
        self.safe = 0

    def add(self, kind: Kind, number: int, digest: int, line: bytes) -> None:
        """See `LineStore`."""
        self._added += 1
        self.waiting += len(line)
        if kind is Kind.ERROR and self._errors_path is not None:
            with writing(self._errors_path):
                if self._errors is None:
                    self._errors = self._errors_path.open("wb")
                self._errors.write(line)
            return
        with writing(Path("standard output")):
            self._output.write(line)
            self._output.flush()

    def sync(self) -> None:
        """See `LineStore`."""
        if self._errors is not None and self._errors_path is not None:
            with writing(self._errors_path):
                self._errors.flush()
        self.waiting, self.safe = 0, self._added

    def close(self) -> None:
        """See `LineStore`."""
        if self._errors is not None:
            self._errors.close()


def lock(path: Path, descriptor: int, disk: Disk = DISK) -> None:
    """Lock an open journal, or close it and raise `JobError` if another job has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A job that ended, or wrote its journal anew, may have removed the file that was opened.
        ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        disk.close(descriptor)
        raise JobError(f"{path}: another job is writing this output; wait for it, or choose another --output")


def open_journal(path: Path, disk: Disk = DISK, *, create: bool = False) -> int:
    """Open and lock a journal. Raises `JobError`."""
    with writing(path):
        descriptor = disk.open(path, create=create)
    lock(path, descriptor, disk)
    return descriptor


def create_store(files: JobFiles, header: Header, descriptor: int, disk: Disk = DISK) -> JobStore:
    """The files of a job that starts; what stood in its `.part` files is gone. Raises `JobError`.

    `descriptor` is the journal, open and locked; it is the store's own once it is returned.
    """
    journal = start_journal(files.journal, descriptor, header, disk)
    with writing(files.output):
        disk.remove(files.errors_part)
    store = _opened(JobStore(files, journal, descriptor, Ends(0, 0), disk))
    with writing(files.output):
        for folder in files.folders:
            disk.sync_folder(folder)
    return store


def continue_store(files: JobFiles, found: Replay, descriptor: int, disk: Disk = DISK) -> JobStore:
    """The files of a job that goes on behind what its journal tells of, else as `create_store`."""
    journal = continue_journal(files.journal, descriptor, found, disk)
    return _opened(JobStore(files, journal, descriptor, found.ends, disk))


def _opened(store: JobStore) -> JobStore:
    try:
        store.open()
    except BaseException:
        store.close_lines()
        raise
    return store


def rewrite_journal(
    files: JobFiles, header: Header, rows: Records, descriptor: int, disk: Disk = DISK
) -> int:
    """Put a journal of just these rows in the place of the one that is open; returns its descriptor.

    It is there as a whole or not at all, and locked throughout. Raises `JobError`.
    """
    path = files.journal.with_name(files.journal.name + ".new")
    with writing(path):
        new = disk.open(path, create=True)
    lock(path, new, disk)
    write_rows(start_journal(path, new, header, disk), rows, files.answers_part, files.errors_part)
    with writing(files.journal):
        disk.replace(path, files.journal)
        for folder in files.folders:
            disk.sync_folder(folder)
    disk.close(descriptor)
    return new
