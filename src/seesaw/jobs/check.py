"""Whether the lines of a job are those its journal tells of, and the journal anew where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from seesaw.core.errors import JobError
from seesaw.jobs.disk import JobFiles, reading
from seesaw.jobs.journal import RECORD_BYTES, Ends, Group, Journal, Kind, Records, Replay

_GROUP_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Check:
    """How far the lines are good: all that the journal tells of, if `ends` are the journal's."""

    ends: Ends
    damage: str = ""
    """The first line whose bytes changed, if any did."""


class _Lines:
    """A file of lines, read from front to back as far as it is good."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        self.good = 0
        """Bytes up to the end of the last good line."""
        self.ended = False
        """Whether a line was missing or changed: no later one counts."""
        self.damage = ""
        self._file: BinaryIO | None = None
        if path.exists():
            self._file = path.open("rb")

    def read(self, count: int) -> bytes:
        with reading(self.path):
            return b"" if self._file is None or self.ended else self._file.read(count)

    def take(self, rows: Records, data: bytes, start: int) -> None:
        """Go through the lines of a group one by one; `data` begins at byte `start`."""
        if self.ended:
            return
        for row in rows[rows["kind"] == self.kind]:
            offset, length = int(row["b"]), int(row["c"])
            line = data[offset - start : offset - start + length]
            if len(line) == length and crc32(line) != row["d"]:
                self.damage = (
                    f"{self.path}: the line at byte {offset:,} (row {row['a']:,}) is not what was written"
                )
            if len(line) < length or self.damage:
                self.ended = True
                return
            self.good = offset + length

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def check_lines(files: JobFiles, found: Replay) -> Check:
    """Compare the bytes of all lines with the journal. Raises `JobError` if a file cannot be read."""
    answers = _Lines(files.answers_part, Kind.ANSWER)
    errors = _Lines(files.errors_part, Kind.ERROR)
    try:
        for group in found.groups():
            _check_group(group, answers, errors)
            if answers.ended and errors.ended:
                break
    finally:
        answers.close()
        errors.close()
    return Check(Ends(answers.good, errors.good), answers.damage or errors.damage)


def _check_group(group: Group, answers: _Lines, errors: _Lines) -> None:
    some = answers.read(group.end.answers - group.start.answers)
    others = errors.read(group.end.errors - group.start.errors)
    if not (answers.ended or errors.ended) and crc32(others, crc32(some)) == group.lines_crc:
        answers.good, errors.good = group.end
        return
    answers.take(group.rows, some, group.start.answers)
    errors.take(group.rows, others, group.start.errors)


def within(rows: Records, ends: Ends) -> Records:
    """The rows whose lines stand before `ends`."""
    limits = np.where(rows["kind"] == Kind.ANSWER, ends.answers, ends.errors)
    kept: Records = rows[rows["b"] + rows["c"] <= limits]
    return kept


def write_rows(journal: Journal, rows: Records, answers: Path, errors: Path) -> None:
    """Write rows into a journal that has none; their lines stand in the two files, one after the other.

    Raises `JobError`, also where a line is not what `rows` say.
    """
    sources = (_Lines(answers, Kind.ANSWER), _Lines(errors, Kind.ERROR))
    try:
        ends = [0, 0]
        for first in range(0, len(rows), _GROUP_ROWS):
            some = rows[first : first + _GROUP_ROWS]
            crc = 0
            for i, source in enumerate(sources):
                start = ends[i]
                ends[i] += int(some["c"][some["kind"] == source.kind].sum())
                data = source.read(ends[i] - start)
                source.take(some, data, start)
                if source.ended:
                    raise JobError(source.damage or f"{source.path}: is shorter than when it was written")
                crc = crc32(data, crc)
            journal.commit(_packed(journal, some), Ends(*ends), crc)
    finally:
        for source in sources:
            source.close()


def _packed(journal: Journal, rows: Records) -> bytearray:
    group = bytearray()
    for row in rows.tolist():
        kind, _, _, number, offset, length, crc, digest, _ = row
        group += journal.row(kind, number, offset, length, crc, digest)
    assert len(group) == len(rows) * RECORD_BYTES
    return group
