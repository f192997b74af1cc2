"""The journal of a job: which rows are done, and where their lines stand.

A file of records of 40 bytes. The first is the header; a record then stands for each finished row, in groups,
each closed by a commit. A group is written when the lines of its rows are durable, and counts once its commit
is. So a crash leaves a torn last group at most, whose rows run again; everything before it is covered by
checksums, and a byte that changed there is found and named.

| record | a | b | c | d | e |
|---|---|---|---|---|---|
| header | version | job | round | | |
| answer, error | number of the row | offset of its line | length of its line | CRC-32 of its line | its digest |
| commit | end of the answers | end of the errors | records | their CRC-32, chained | that of their lines |

Each ends in a CRC-32 of its own, seeded with the job's number, so that no record of another job passes.
`sequence` counts the groups. The CRC of lines is over the group's answers, then its errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from seesaw.jobs.disk import DISK, Disk, reading, writing

RECORD_BYTES = 40
_LAYOUT = struct.Struct("<BxxxIQQIII")
_MAGIC = 0x4A535753  # "SWSJ"; stands in the header's `sequence`
_VERSION = 1

RECORD = np.dtype(
    [("kind", "u1"), ("zero", "u1", 3), ("sequence", "<u4"), ("a", "<u8"), ("b", "<u8")]
    + [(name, "<u4") for name in ("c", "d", "e", "crc")]
)
"""A record as numpy sees it."""

Records = NDArray[Any]
"""Records of rows, shape (rows,), of type `RECORD`."""


class Kind(IntEnum):
    """What a record is. Zero is none, so that a hole in the file is no record."""

    HEADER = 1
    ANSWER = 2
    ERROR = 3
    COMMIT = 4


class Ends(NamedTuple):
    """Bytes of the two files of lines."""

    answers: int
    errors: int


class Damage(Exception):
    """A journal that is not what was written."""


@dataclass(frozen=True, slots=True)
class Header:
    """Of which job a journal is, and of which round of it: each round of `--retry-errors` starts a new journal."""

    job: int
    round: int = 0

    @property
    def seed(self) -> int:
        """Of the CRCs of all records."""
        return crc32(self.job.to_bytes(8, "little"))


@dataclass(frozen=True, slots=True)
class Group:
    """Rows whose lines became durable together."""

    rows: Records
    start: Ends
    end: Ends
    lines_crc: int


@dataclass(slots=True)
class Replay:
    """What a journal holds, up to the last commit that stands on whole groups."""

    header: Header
    records: Records
    """All records of the file, as they stand there."""
    closings: list[int] = field(default_factory=list)
    """Positions of the commits."""
    chain: int = 0
    """CRC of the records of the last group, to go on with."""
    torn: int = 0
    """Bytes after the last commit; their rows do not count."""
    damage: str = ""
    """What is wrong before the end of the file, if something is."""

    @property
    def size(self) -> int:
        """Bytes up to the last commit, header included."""
        return RECORD_BYTES * (1 + (self.closings[-1] if self.closings else 0))

    @property
    def ends(self) -> Ends:
        """Bytes of lines that are durable."""
        return self._ends(self.closings[-1]) if self.closings else Ends(0, 0)

    def _ends(self, position: int) -> Ends:
        return Ends(int(self.records["a"][position]), int(self.records["b"][position]))

    def groups(self) -> Iterator[Group]:
        """The groups in order. Their records are views."""
        first, start = 1, Ends(0, 0)
        for position in self.closings:
            end = self._ends(position)
            yield Group(self.records[first:position], start, end, int(self.records["e"][position]))
            first, start = position + 1, end

    def rows(self) -> Records:
        """The records of all rows, copied."""
        parts = [group.rows for group in self.groups()]
        return np.concatenate(parts) if parts else np.empty(0, RECORD)


def pack(kind: Kind, sequence: int, a: int, b: int, c: int, d: int, e: int, *, seed: int) -> bytes:
    """A record with its CRC."""
    body = _LAYOUT.pack(kind, sequence, a, b, c, d, e)
    return body + crc32(body, seed).to_bytes(4, "little")


def _header(header: Header) -> bytes:
    return pack(Kind.HEADER, _MAGIC, _VERSION, header.job, header.round, 0, 0, seed=0)


def _valid(record: bytes, seed: int) -> bool:
    return crc32(record[:-4], seed) == int.from_bytes(record[-4:], "little")


def replay(path: Path) -> Replay:
    """Read a journal. Raises `JobError` if it cannot be read, `Damage` if its header is not one."""
    with reading(path):
        size = path.stat().st_size
        data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    whole = len(data) // RECORD_BYTES
    records = data[: whole * RECORD_BYTES].view(RECORD)
    header = _read_header(path, records)
    found = Replay(header, records)
    _take_groups(found)
    found.torn = len(data) - found.size
    found.damage = _look_for_damage(path, found)
    return found


def _read_header(path: Path, records: Records) -> Header:
    raw = records[:1].tobytes()
    if not raw or not _valid(raw, 0) or raw[0] != Kind.HEADER:
        raise Damage(f"{path}: the header is damaged (record 0, byte 0)")
    _, magic, version, job, round_, _, _ = _LAYOUT.unpack(raw[:-4])
    if magic != _MAGIC or version != _VERSION:
        raise Damage(
            f"{path}: is no journal that this version reads (version {version}, expected {_VERSION})"
        )
    return Header(job, round_)


def _take_groups(found: Replay) -> None:
    """Take groups as long as they are whole."""
    seed, chain, first = found.header.seed, 0, 1
    for at in np.flatnonzero(found.records["kind"] == Kind.COMMIT):
        position = int(at)
        raw = found.records[position : position + 1].tobytes()
        _, sequence, _, _, count, crc, _ = _LAYOUT.unpack(raw[:-4])
        rows = found.records[first:position]
        after = crc32(rows.tobytes(), chain)
        whole = _valid(raw, seed) and (sequence, count, crc) == (len(found.closings), len(rows), after)
        if not whole:
            return
        found.closings.append(position)
        found.chain = chain = after
        first = position + 1


def _look_for_damage(path: Path, found: Replay) -> str:
    """Where a group is broken that is not the last: a later commit stands behind it."""
    seed, expected = found.header.seed, len(found.closings)
    first = found.size // RECORD_BYTES
    rest = found.records[first:]
    later = rest[(rest["kind"] == Kind.COMMIT) & (rest["sequence"] > expected)]
    if not any(_valid(record.tobytes(), seed) for record in later):
        return ""
    broken = 0
    for broken, record in enumerate(rest):  # noqa: B007
        if not _valid(record.tobytes(), seed) or record["sequence"] != expected:
            break
    position = first + broken
    return f"{path}: record {position:,} (byte {position * RECORD_BYTES:,}) is damaged"


class Journal:
    """A journal that is being written. The caller sees to it that lines are durable before their rows come here."""

    def __init__(self, path: Path, descriptor: int, found: Replay, disk: Disk) -> None:
        self._path, self._descriptor, self._disk = path, descriptor, disk
        self._seed = found.header.seed
        self._size, self._chain, self._sequence = found.size, found.chain, len(found.closings)

    @property
    def sequence(self) -> int:
        """The number of the group that comes next."""
        return self._sequence

    def row(self, kind: Kind, number: int, offset: int, length: int, crc: int, digest: int) -> bytes:
        """The record of a row of the next group."""
        return pack(kind, self._sequence, number, offset, length, crc, digest, seed=self._seed)

    def commit(self, rows: bytes | bytearray, ends: Ends, lines_crc: int) -> None:
        """Write a group and make it durable. Raises `JobError`."""
        count = len(rows) // RECORD_BYTES
        chain = crc32(rows, self._chain)
        closing = pack(Kind.COMMIT, self._sequence, *ends, count, chain, lines_crc, seed=self._seed)
        group = bytes(rows) + closing
        with writing(self._path):
            self._disk.write(self._descriptor, group, self._size)
            self._disk.sync(self._descriptor)
        self._size += len(group)
        self._chain, self._sequence = chain, self._sequence + 1


def start_journal(path: Path, descriptor: int, header: Header, disk: Disk = DISK) -> Journal:
    """Make an open file a journal without rows. Raises `JobError`."""
    with writing(path):
        disk.truncate(descriptor, 0)
        disk.write(descriptor, _header(header), 0)
        disk.sync(descriptor)
    return Journal(path, descriptor, Replay(header, np.empty(1, RECORD)), disk)


def continue_journal(path: Path, descriptor: int, found: Replay, disk: Disk = DISK) -> Journal:
    """Go on behind the last whole group; what follows it is cut off. Raises `JobError`."""
    if found.torn:
        with writing(path):
            disk.truncate(descriptor, found.size)
            disk.sync(descriptor)
    return Journal(path, descriptor, found, disk)
