"""`ParquetSink`: Parquet, a row group at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from seesaw.jobs.sinks.flat import OURS
from seesaw.jobs.sinks.table import Rows, TableSink

logger = logging.getLogger(__name__)

_OUR_TYPES = {
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "texts": pa.list_(pa.string()),
}
_REWRITE_ROWS = 1_000


class ParquetSink(TableSink):
    """See `Sink`. A column that passes through has the type that holds all its values; if none does, text."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._types: dict[str, pa.DataType] = {}
        """Of columns that pass through; the null type while all values are null."""
        self._mixed: set[str] = set()
        """Columns that are text because no other type holds their values; what is no text stands as JSON."""
        self._schema: pa.Schema | None = None
        self._writer: pq.ParquetWriter | None = None

    def _group(self, rows: Rows) -> None:
        if not rows and self._writer is not None:
            return
        values = {name: [row.get(name) for row in rows] for name in self.columns}
        for name, cells in values.items():
            if name not in OURS:
                self._widen(name, cells)
        if self._writer is not None and self._wanted() != self._schema:
            self._rewrite()
        if self._writer is None:
            self._schema = self._wanted()
            self._writer = _open(self._path, self._schema)
        self._writer.write_table(self._table(values))

    def _widen(self, name: str, cells: list[Any]) -> None:
        """Make the type of a column hold `cells` as well."""
        if name in self._mixed:
            return
        if _mixes_truth(cells):
            self._give_up(name)
            return
        before = self._types.get(name, pa.null())
        try:
            found = pa.array(cells).type
            both = [pa.schema({name: before}), pa.schema({name: found})]
            wide = pa.unify_schemas(both, promote_options="permissive").field(0).type
            pa.array(cells, wide)
        except (pa.ArrowException, OverflowError):
            self._give_up(name)
            return
        if _storable(wide):
            self._types[name] = wide
        else:
            self._give_up(name)

    def _give_up(self, name: str) -> None:
        logger.warning("%s: no type holds all values of column %s; it is written as text", self._path, name)
        self._mixed.add(name)
        self._types[name] = pa.string()

    def _wanted(self) -> pa.Schema:
        """The schema for the rows so far."""
        return pa.schema([(name, self._type(name)) for name in self.columns])

    def _type(self, name: str) -> pa.DataType:
        known = _OUR_TYPES.get(name) or self._types.get(name, pa.string())
        # Few programs read columns of the null type.
        return pa.string() if pa.types.is_null(known) else known

    def _table(self, values: Mapping[str, list[Any]]) -> pa.Table:
        schema = self._schema
        assert schema is not None
        rows = len(next(iter(values.values())))
        columns = [self._array(values.get(f.name) or [None] * rows, f) for f in schema]
        return pa.Table.from_arrays(columns, schema=schema)

    def _array(self, cells: list[Any], wanted: pa.Field) -> pa.Array:
        if wanted.name in self._mixed:
            cells = [_text(cell) for cell in cells]
        return pa.array(cells, wanted.type)

    def _rewrite(self) -> None:
        """Give the rows in the file the columns and types that are wanted by now."""
        assert self._writer is not None
        self._writer.close()
        beside = self._path.with_name(self._path.name + ".rewrite")
        written = False
        while not written:
            self._schema = self._wanted()
            self._writer = _open(beside, self._schema)
            with pq.ParquetFile(self._path, pre_buffer=False) as old:
                written = all(map(self._copy, old.iter_batches(batch_size=_REWRITE_ROWS)))
            if not written:
                self._writer.close()
        os.replace(beside, self._path)  # goes on being written under the name

    def _copy(self, batch: pa.RecordBatch) -> bool:
        """Append rows of the earlier file; False if a type turns out not to hold them, and is given up."""
        assert self._writer is not None and self._schema is not None
        values = batch.to_pydict()
        for name in values.keys() - OURS:
            try:
                self._array(values[name], self._schema.field(name))
            except (pa.ArrowException, OverflowError):
                self._give_up(name)
                return False
        self._writer.write_table(self._table(values))
        return True

    def _finish(self) -> None:
        assert self._writer is not None
        self._writer.close()

    def abandon(self) -> None:
        """See `Sink`."""
        try:
            if self._writer is not None:
                self._writer.close()
        except (OSError, pa.ArrowException):
            logger.debug("%s could not be closed", self._path, exc_info=True)


def _open(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd")


def _mixes_truth(cells: Iterable[Any]) -> bool:
    """Whether booleans stand among numbers, which pyarrow takes for numbers too: also in lists, or fields of objects,
    of one place."""
    kinds = {type(cell) for cell in cells}
    if bool in kinds and kinds & {int, float}:
        return True
    nested = [item for cell in cells if isinstance(cell, list) for item in cell]
    objects = [cell for cell in cells if isinstance(cell, dict)]
    fields = {name for item in objects for name in item}
    return (bool(nested) and _mixes_truth(nested)) or any(
        _mixes_truth([item[name] for item in objects if name in item]) for name in fields
    )


def _storable(data_type: pa.DataType) -> bool:
    """Parquet has no objects without fields."""
    if pa.types.is_struct(data_type):
        return data_type.num_fields > 0 and all(_storable(field.type) for field in data_type)
    return not pa.types.is_list(data_type) or _storable(data_type.value_type)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()
