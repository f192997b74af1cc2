"""What earlier sessions of a job have done, as the one that goes on needs it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from seesaw.jobs.disk import reading
from seesaw.jobs.journal import Kind, Records


class DoneRows:
    """Which rows of a job are done, and what each was: five bytes per row of the input."""

    def __init__(self) -> None:
        self._kinds = np.zeros(0, np.uint8)
        self._digests = np.zeros(0, np.uint32)
        self.answered = 0
        self.failed = 0

    def add(self, rows: Records) -> None:
        """Note rows."""
        if not len(rows):
            return
        numbers = rows["a"].astype(np.int64)
        self._reach(int(numbers.max()) + 1)
        self._kinds[numbers] = rows["kind"]
        self._digests[numbers] = rows["e"]
        failed = int((rows["kind"] == Kind.ERROR).sum())
        self.failed += failed
        self.answered += len(rows) - failed

    def _reach(self, size: int) -> None:
        if size > len(self._kinds):
            size = max(size, 2 * len(self._kinds))
            self._kinds = np.concatenate([self._kinds, np.zeros(size - len(self._kinds), np.uint8)])
            self._digests = np.concatenate([self._digests, np.zeros(size - len(self._digests), np.uint32)])

    def __len__(self) -> int:
        return self.answered + self.failed

    def digest(self, number: int) -> int | None:
        """What a row was when it was done; None if it is not."""
        if number < len(self._kinds) and self._kinds[number]:
            return int(self._digests[number])
        return None


class _Error(msgspec.Struct):
    code: str


class _Body(msgspec.Struct):
    error: _Error


class _Response(msgspec.Struct):
    body: _Body


class _ErrorLine(msgspec.Struct):
    response: _Response | None
    error: _Error | None

    @property
    def code(self) -> str:
        if self.error is not None:
            return self.error.code
        return self.response.body.error.code if self.response is not None else "unknown"


def failures_by_code(path: Path, size: int) -> dict[str, int]:
    """The lines of an error file up to byte `size`, counted by code. Raises `JobError` if it cannot be read."""
    counts: dict[str, int] = {}
    decoder = msgspec.json.Decoder(_ErrorLine)
    with reading(path), path.open("rb") as file:
        while size:
            line = file.readline()
            size -= len(line)
            code = decoder.decode(line).code
            counts[code] = counts.get(code, 0) + 1
    return counts
