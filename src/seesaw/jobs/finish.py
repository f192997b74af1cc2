"""The end of a job: its lines become the output and the error file.

Every step may be repeated, so that a job that dies here goes on where it stood.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seesaw.core.errors import JobFilesError
from seesaw.jobs.disk import DISK, Disk, JobFiles, size_of, writing
from seesaw.jobs.journal import Kind, Records, Replay
from seesaw.jobs.sinks.open import is_plain, open_sink

_BUFFER = 1 << 20
_CHUNK_ROWS = 1 << 14


def finish(lines: Iterator[bytes], target: Path, disk: Disk = DISK) -> None:
    """Make `target` of lines (`\\n` included), in the format of its name.

    It appears as a whole, in the place of what stood there. Raises `JobError`.
    """
    temporary = target.with_name(f"{target.name}.finishing")
    with writing(target):
        plain = is_plain(target)
        if not plain:
            with open_sink(temporary, name=target) as sink:
                for line in lines:
                    sink.write(line)
        descriptor = disk.open(temporary, create=plain)
        try:
            if plain:
                _write_lines(lines, descriptor, disk)
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.replace(temporary, target)
        disk.sync_folder(target.parent)


def _write_lines(lines: Iterator[bytes], descriptor: int, disk: Disk) -> None:
    disk.truncate(descriptor, 0)
    written, buffer = 0, bytearray()
    for line in lines:
        buffer += line
        if len(buffer) >= _BUFFER:
            disk.write(descriptor, buffer, written)
            written += len(buffer)
            buffer.clear()
    disk.write(descriptor, buffer, written)


def finish_files(files: JobFiles, found: Replay, *, ordered: bool, disk: Disk = DISK) -> None:
    """Give a job's lines their names, the error file first. Raises `JobError`.

    Lines that are written anew stay in their `.part` file, until `clear_up`.
    """
    pairs = ((files.errors_part, files.errors, Kind.ERROR), (files.answers_part, files.output, Kind.ANSWER))
    for (part, target, kind), size in zip(pairs, reversed(found.ends), strict=True):
        if kind is Kind.ERROR and not size:
            with writing(target):
                disk.remove(part)
                disk.remove(target)
                disk.sync_folder(target.parent)
        elif ordered or not is_plain(target):
            finish(_lines(part, found, kind, ordered=ordered), target, disk)
        else:
            _rename(part, target, size, disk)


def clear_up(files: JobFiles, disk: Disk, *, failed: bool) -> None:
    """Remove what a finished job needs no more. Raises `JobError`.

    Where rows failed, what it takes to run them again stays: the journal, and the lines of an output of another
    format.
    """
    with writing(files.journal):
        if not failed or is_plain(files.output):
            disk.remove(files.answers_part)
        disk.remove(files.errors_part)
        if not failed:
            disk.remove(files.journal)
        for folder in files.folders:
            disk.sync_folder(folder)


def _rename(part: Path, target: Path, size: int, disk: Disk) -> None:
    """Rename, unless that happened before a crash."""
    if size_of(part) is None:
        if size_of(target) != size:
            raise JobFilesError(
                f"{part}: is gone, with {size:,} bytes of lines; --force runs every row again"
            )
        return
    with writing(target):
        disk.replace(part, target)
        disk.sync_folder(target.parent)


def _lines(part: Path, found: Replay, kind: Kind, *, ordered: bool) -> Iterator[bytes]:
    """The lines of one kind, by arrays of offsets rather than objects."""
    offsets, lengths = _places(found, kind, ordered=ordered)
    if not len(offsets):
        return
    with part.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for first in range(0, len(offsets), _CHUNK_ROWS):
            some = slice(first, first + _CHUNK_ROWS)
            for offset, length in zip(offsets[some].tolist(), lengths[some].tolist(), strict=True):
                yield data[offset : offset + length]


def _places(found: Replay, kind: Kind, *, ordered: bool) -> tuple[Records, Records]:
    """Offsets and lengths of the lines of one kind; 20 bytes per row while they are put in order."""
    rows = [
        (g["a"], g["b"], g["c"])
        for group in found.groups()
        if len(g := group.rows[group.rows["kind"] == kind])
    ]
    if not rows:
        return np.empty(0, np.uint64), np.empty(0, np.uint32)
    numbers, offsets, lengths = (np.concatenate(column) for column in zip(*rows, strict=True))
    if not ordered:
        return offsets, lengths
    order = np.argsort(numbers, kind="stable")
    return offsets[order], lengths[order]
