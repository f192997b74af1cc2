"""`JsonLines`: a JSONL file as a source of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from seesaw.core.errors import JobError
from seesaw.jobs.base import Row, RowFailure
from seesaw.jobs.lines import LineCounter
from seesaw.jobs.reader import read_rows


class JsonLines:
    """See `RowReader`. Raises `JobError` at once if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_binary(path)
        self._counter = LineCounter(path)

    def __iter__(self) -> Iterator[Row | RowFailure]:
        try:
            yield from read_rows(self._file)
        except OSError as error:
            raise unreadable(self._path, error) from error

    @property
    def total(self) -> int | None:
        """Lines of the file."""
        return self._counter.count

    def left(self, read: int) -> int | None:
        """Rows still to be read, if they go on as they were so far."""
        try:
            size, position = os.fstat(self._file.fileno()).st_size, self._file.tell()
        except OSError:  # a pipe
            return None
        if not read:
            return None
        return round(read * max(0, size - position) / max(1, position))

    def close(self) -> None:
        """See `RowReader`."""
        self._counter.close()
        self._file.close()


def open_binary(path: Path) -> BinaryIO:
    """Raises `JobError`."""
    try:
        return path.open("rb", buffering=1 << 20)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> JobError:
    """What to say of a file that cannot be read."""
    return JobError(f"{path}: cannot be read ({error.strerror})")
