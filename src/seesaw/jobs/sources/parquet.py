"""`ParquetTable`: the rows of a Parquet file, page by page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from seesaw.core.errors import JobError
from seesaw.jobs.reader import Parsed, Record, RecordError, Unit
from seesaw.jobs.sources.base import ColumnNames
from seesaw.jobs.sources.columns import TableColumns
from seesaw.jobs.sources.streams import DamagedStream

_BATCH_ROWS = 256
"""Rows decoded at once: few, since a prompt may be long."""
_BUFFER = 1 << 20


class ParquetTable:
    """See `Source`."""

    unit: Unit = "row"

    def __init__(self, path: Path, names: ColumnNames) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._errors = (pa.ArrowException, OSError, ValueError, OverflowError)
        try:
            # Neither whole row groups nor the whole file ahead: memory stays constant.
            self._file = pq.ParquetFile(
                path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
            )
        except self._errors as error:
            raise JobError(f"{path}: cannot be read as Parquet ({_reason(error)})") from error
        try:
            self._columns = TableColumns(path, self._file.schema_arrow.names, names)
        except BaseException:
            self.close()
            raise
        self._rows: int = self._file.metadata.num_rows
        self._read = 0

    def describe(self) -> str | None:
        """See `Source`."""
        return self._columns.describe()

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        for batch in self._batches():
            for digest, content in self._contents(batch):
                self._read += 1
                yield Record(self._read, digest, content)

    def share(self) -> float | None:
        """See `Source`."""
        return self._read / self._rows if self._rows else 1.0

    def count(self, stop: threading.Event) -> int | None:
        """See `Source`."""
        return self._rows

    def close(self) -> None:
        """See `Source`."""
        self._file.close()

    def _batches(self) -> Iterator[Any]:
        batches = self._file.iter_batches(
            batch_size=_BATCH_ROWS, columns=self._columns.used, use_threads=False
        )
        while True:
            try:
                batch = next(batches, None)
            except self._errors as error:
                raise DamagedStream(f"the Parquet data are damaged: {_reason(error)}") from error
            if batch is None:
                return
            yield batch

    def _contents(self, batch: Any) -> Iterator[tuple[int, Parsed | RecordError]]:
        try:
            rows = self._values(batch)
        except self._errors:  # of one row; the others are well
            for index in range(batch.num_rows):
                yield self._alone(batch.slice(index, 1))
            return
        for values in rows:
            yield self._content(values)

    def _alone(self, row: Any) -> tuple[int, Parsed | RecordError]:
        try:
            return self._content(self._values(row)[0])
        except UnicodeDecodeError as error:
            return 0, RecordError("invalid_utf8", f"a text of the row is not UTF-8 ({error.reason})")
        except self._errors as error:
            return 0, RecordError("invalid_row", f"a value of the row cannot be read ({_reason(error)})")

    def _values(self, batch: Any) -> list[dict[str, Any]]:
        """The rows of a batch, their bytes as text unless they pass through, their times to the microsecond."""
        import pyarrow as pa

        for index, (name, kind) in enumerate(zip(batch.schema.names, batch.schema.types, strict=True)):
            if pa.types.is_timestamp(kind) and kind.unit == "ns":  # more than Python can hold
                cells = batch.column(index).cast(pa.timestamp("us", kind.tz), safe=False)
            elif (
                pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            ) and name not in self._columns.extra:
                cells = pa.array([b if b is None else b.decode() for b in batch.column(index).to_pylist()])
            else:
                continue
            batch = batch.set_column(index, name, cells)
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows

    def _content(self, values: dict[str, Any]) -> tuple[int, Parsed | RecordError]:
        """As JSON and back: so every value is one that a JSONL row could have."""
        encoded = msgspec.json.encode(values, enc_hook=str)
        try:
            return crc32(encoded), self._columns.parse(msgspec.json.decode(encoded))
        except RecordError as error:
            return crc32(encoded), error


def _reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".: ")
    return "".join(char for char in text if char.isprintable())
