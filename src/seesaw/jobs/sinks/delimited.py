"""`DelimitedSink`: CSV and TSV."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from seesaw.jobs.sinks.packed import PackedFile
from seesaw.jobs.sinks.table import Rows, TableSink
from seesaw.jobs.sources.streams import InputStream


class DelimitedSink(TableSink):
    """See `Sink`. UTF-8, lines end with LF, a null is an empty cell, lists and objects are JSON."""

    def __init__(self, path: Path, delimiter: str, compression: str | None) -> None:
        super().__init__(path)
        self._delimiter, self._compression = delimiter, compression
        self._file = PackedFile(path, compression)
        self._header: list[str] = []

    def _group(self, rows: Rows) -> None:
        columns = self.columns
        if columns != self._header:
            if self._header:
                self._rewrite(columns)
            else:
                self._file.write(self._line(columns))
            self._header = columns
        for row in rows:
            self._file.write(self._line([_cell(row.get(name)) for name in columns]))

    def _line(self, cells: list[str]) -> bytes:
        # With CR in its line end, csv also quotes a cell that has a CR alone.
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=self._delimiter, lineterminator="\r\n").writerow(cells)
        return (buffer.getvalue()[:-2] + "\n").encode()

    def _rewrite(self, columns: list[str]) -> None:
        """Give the rows in the file the cells of `columns` that they lack, empty."""
        self._file.close()
        beside = self._path.with_name(self._path.name + ".rewrite")
        target, stream = PackedFile(beside, self._compression), InputStream(self._path)
        limit = csv.field_size_limit(sys.maxsize)  # of the process
        try:
            text = io.TextIOWrapper(stream.reader, encoding="utf-8", newline="")
            target.write(self._line(columns))
            for values in csv.DictReader(text, delimiter=self._delimiter):
                target.write(self._line([values.get(name, "") for name in columns]))
        finally:
            csv.field_size_limit(limit)
            stream.close()
        os.replace(beside, self._path)
        self._file = target  # goes on being written under the name

    def _finish(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """See `Sink`."""
        self._file.abandon()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()
