"""Job files of every format with the same rows, and what is read of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions, Row, RowFailure
from seesaw.jobs.sources.open import open_rows

Rows = Sequence[dict[str, Any]]


def jsonl(rows: Rows) -> bytes:
    """Plain lines; a field that is None is left out."""
    lines = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def delimited(rows: Rows, delimiter: str = ",") -> bytes:
    """A table with the columns of the first row; None is an empty cell, what is no text is JSON."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(list(rows[0]))
    for row in rows:
        cells = [row[name] for name in rows[0]]
        writer.writerow([v if v is None or isinstance(v, str) else json.dumps(v) for v in cells])
    return text.getvalue().encode()


def parquet(rows: Rows, **options: Any) -> bytes:
    """A Parquet file; types are those of the values."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def zstd(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def tsv(rows: Rows) -> bytes:
    """See `delimited`."""
    return delimited(rows, "\t")


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": jsonl,
    ".jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
    ".jsonl.zst": lambda rows: zstd(jsonl(rows)),
    ".csv": delimited,
    ".csv.gz": lambda rows: gzip.compress(delimited(rows), mtime=0),
    ".tsv": tsv,
    ".tsv.zst": lambda rows: zstd(tsv(rows)),
    ".parquet": parquet,
}


def read(*paths: Path, **options: Any) -> list[Row | RowFailure]:
    """All rows of a job with these inputs. Raises `JobError`."""
    with closing(open_rows(JobOptions(input=paths, model="m", **options))) as rows:
        return list(rows)


def read_until_error(*paths: Path, **options: Any) -> tuple[list[Row | RowFailure], str | None]:
    """The rows that come, and the error that ends them, if one does."""
    found: list[Row | RowFailure] = []
    try:
        with closing(open_rows(JobOptions(input=paths, model="m", **options))) as rows:
            for row in rows:
                found.append(row)
    except JobError as error:
        return found, str(error)
    return found, None
