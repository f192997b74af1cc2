"""`DelimitedTable`: the rows of a CSV or TSV file. All cells are text."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from seesaw.core.errors import JobError
from seesaw.core.units import format_bytes
from seesaw.jobs.lines import MAX_LINE_BYTES, skip_line
from seesaw.jobs.reader import Parsed, Record, RecordError, Unit
from seesaw.jobs.sources.base import ColumnNames
from seesaw.jobs.sources.columns import TableColumns
from seesaw.jobs.sources.streams import DamagedStream, InputStream, shown_path, unreadable

_BOM = b"\xef\xbb\xbf"


class DelimitedTable:
    """See `Source`. Cells are separated by `delimiter` and quoted with `"`; the first row names the columns."""

    unit: Unit = "row"

    def __init__(self, path: Path, stream: InputStream, names: ColumnNames, delimiter: str) -> None:
        self._stream = stream
        self._lines = _Lines(stream)
        # The limit belongs to the process; it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        self._reader = csv.reader(self._lines, delimiter=delimiter, strict=True)
        self._header = self._read_header(path, delimiter)
        self._columns = TableColumns(path, self._header, names)

    def describe(self) -> str | None:
        """See `Source`."""
        return self._columns.describe()

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        number = 0
        while True:
            self._lines.begin_row()
            content: Parsed | RecordError
            try:
                cells = next(self._reader)
                if not cells:
                    continue
                content = self._columns.parse(self._values(cells))
            except StopIteration:
                return
            except csv.Error as error:
                content = self._malformed(error)
            except RecordError as error:
                content = error
            number += 1
            yield Record(number, self._lines.digest, content)

    def share(self) -> float | None:
        """See `Source`."""
        return self._stream.share()

    def count(self, stop: threading.Event) -> int | None:
        """Not to be had without reading all of it: cells may hold line ends."""
        return None

    def close(self) -> None:
        """See `Source`."""
        self._stream.close()

    def _read_header(self, path: Path, delimiter: str) -> list[str]:
        where = shown_path(path)
        try:
            header = next(filter(None, self._reader), [])
        except OSError as error:
            raise unreadable(path, error) from error
        except (csv.Error, RecordError, DamagedStream) as error:
            raise JobError(
                f"{where}: the line with the names of the columns cannot be read ({error})"
            ) from error
        if not header:
            raise JobError(f"{where}: is empty; expected a first line with the names of the columns")
        if any(_has_bad_utf8(name) for name in header):
            raise JobError(f"{where}: the names of the columns are not UTF-8; save the file as UTF-8")
        other = next((d for d in ("\t", ";", ",") if d != delimiter and d in header[0]), None)
        if len(header) == 1 and other is not None:
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise JobError(
                f"{where}: the columns are separated by {other!r}; a {kind} file has {delimiter!r}"
            )
        # Data frames leave the name of their index column empty.
        return [name or f"column_{position}" for position, name in enumerate(header, 1)]

    def _values(self, cells: list[str]) -> dict[str, str]:
        if len(cells) != len(self._header):
            raise RecordError(
                "invalid_csv", f"expected {len(self._header)} cells, found {len(cells)}", where=self._where()
            )
        if self._lines.suspicious:
            bad = next((n for n, cell in zip(self._header, cells, strict=True) if _has_bad_utf8(cell)), None)
            if bad is not None:
                raise RecordError("invalid_utf8", f"{bad}: is not UTF-8", bad, where=self._where())
        return dict(zip(self._header, cells, strict=True))

    def _malformed(self, error: csv.Error) -> RecordError:
        text = str(error)
        if "unexpected end of data" in text:
            text = "a quoted cell has no end"
        elif "field larger than" in text:
            text = f"a cell has more than {format_bytes(MAX_LINE_BYTES)}; a quote may be missing"
        return RecordError("invalid_csv", f"not valid CSV ({text})", where=self._where())

    def _where(self) -> str:
        first, last = self._lines.first, self._lines.number
        return f" (line {first})" if first == last else f" (lines {first} to {last})"


class _Lines(Iterator[str]):
    """Lines of a file as text, with what is known of those of the present row.

    Bytes that are not UTF-8 stand as lone surrogates. Raises `RecordError` for a line that is too long.
    """

    def __init__(self, stream: InputStream) -> None:
        self._file = stream.reader
        self.number = 0
        """1-based number of the last line."""
        self.begin_row()

    def begin_row(self) -> None:
        self.first = self.number + 1
        self.digest = 0
        """CRC-32 of the row, without its line end."""
        self.suspicious = False
        """Whether the row has bytes that are not UTF-8."""

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 2)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            skip_line(self._file)
            most = format_bytes(MAX_LINE_BYTES)
            raise RecordError(
                "line_too_long",
                f"the line has more than {most}, the most that is read",
                where=f" (line {self.number})",
            )
        self.digest = crc32(line.rstrip(b"\r\n"), self.digest)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.suspicious = True
            return line.decode(errors="surrogateescape")


def _has_bad_utf8(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)
