"""`TableSink`: lines gathered into groups of rows, for a format with columns.

Columns are known only from the rows themselves. What the rows at hand need is written; when a later row needs
more (a new column, a wider type), what stands in the file is rewritten, a group at a time. That is rare: the
rows of a job are much alike.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

from seesaw.jobs.sinks.base import Sink
from seesaw.jobs.sinks.flat import ANSWER, FAILURE, ID, OURS, flatten

GROUP_ROWS = 20_000
GROUP_BYTES = 32 << 20
"""A group ends with the row that reaches either: of lines, as JSON."""
Rows = list[dict[str, Any]]


class TableSink(Sink):
    """See `Sink`. A format says how a group is written, and how a file is rewritten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: Rows = []
        self._bytes = 0
        self._extra: dict[str, None] = {}
        """Columns that pass through, in the order in which they came."""
        self._several = False
        self._failures = False
        self._answers = False
        self._closed = False

    def write(self, line: bytes) -> None:
        """See `Sink`."""
        row = flatten(line)
        self._note(row)
        self._rows.append(row)
        self._bytes += len(line)
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """See `Sink`."""
        if self._closed:
            return
        try:
            self._flush()
            self._finish()
        except BaseException:
            self.abandon()
            raise
        self._closed = True
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())

    @property
    def columns(self) -> list[str]:
        """Columns of the rows so far: the id, those that pass through, those of answers or failures."""
        answer = [name for name in ANSWER if name != "texts" or self._several]
        ours = [
            *(answer if self._answers or not self._failures else ()),
            *(FAILURE if self._failures else ()),
        ]
        return [ID, *self._extra, *ours]

    def _note(self, row: dict[str, Any]) -> None:
        for name in row:
            if name not in OURS:
                self._extra.setdefault(name)
        self._several |= "texts" in row
        self._failures |= "code" in row
        self._answers |= "text" in row

    def _flush(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        self._group(rows)

    @abstractmethod
    def _group(self, rows: Rows) -> None:
        """Write `rows`, perhaps none, with `columns`; the first group fixes the head of the file."""

    @abstractmethod
    def _finish(self) -> None:
        """Close the file; it is whole."""
