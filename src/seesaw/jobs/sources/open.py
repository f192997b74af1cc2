"""The inputs of a job: found, checked, and opened as one source of rows."""

from __future__ import annotations

import glob
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from seesaw.core.errors import JobError
from seesaw.jobs.base import COMPRESSED, STDIN, JobOptions, Row, RowFailure, RowReader
from seesaw.jobs.reader import RowMaker
from seesaw.jobs.sinks.open import check_format
from seesaw.jobs.sources.base import ColumnNames, Source
from seesaw.jobs.sources.delimited import DelimitedTable
from seesaw.jobs.sources.jsonl import JsonLines
from seesaw.jobs.sources.parquet import ParquetTable
from seesaw.jobs.sources.streams import (
    DamagedStream,
    InputStream,
    open_binary,
    shown_path,
)

logger = logging.getLogger(__name__)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def find_inputs(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that `patterns` name: each a file, `-` for standard input, or a pattern such as `part-*.jsonl`.

    A pattern stands for its matches in sorted order; `**` goes through folders. Raises `JobError` where a
    pattern matches nothing or a file is named twice.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            real = "-" if path == STDIN else os.path.realpath(path)
            if real in found:
                raise JobError(f"{shown_path(path)}: is named twice among the inputs")
            found[real] = path
    return tuple(found.values())


def _matches(pattern: str) -> list[Path]:
    if pattern == str(STDIN) or not glob.has_magic(pattern) or os.path.exists(pattern):
        return [Path(pattern)]
    matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name))
    if not matches:
        raise JobError(f"{pattern}: matches no file")
    return matches


def check_input(path: Path) -> None:
    """Raise `JobError` if `path` cannot be read."""
    if path == STDIN:
        return
    if path.is_dir():
        raise JobError(f"{path}: is a directory; expected a file, or a pattern such as '{path}/*.jsonl'")
    if path.is_file() or not path.exists():  # opening a pipe to look at it would break it
        open_binary(path).close()


def check_formats(options: JobOptions) -> None:
    """Raise `JobError` if a file is not what its name says, lacks a column, or cannot be written so.

    Logs which columns are what.
    """
    check_format(options.output_path)
    check_format(options.errors_path)
    described: dict[str, list[Path]] = {}
    for path in options.inputs:
        if path.is_file():
            source = _open(path, ColumnNames.of(options))
            source.close()
            described.setdefault(source.describe() or "", []).append(path)
    for columns, paths in described.items():
        if columns:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            logger.info("%s%s: %s", paths[0], more, columns)


def open_rows(options: JobOptions) -> RowReader:
    """The rows of a job. Raises `JobError` if an input cannot be opened."""
    return _Inputs(options.inputs, ColumnNames.of(options))


class _Inputs:
    """See `RowReader`. One input is open at a time; the first is at once."""

    def __init__(self, paths: Sequence[Path], names: ColumnNames) -> None:
        if not paths:
            raise JobError("no input was given")
        for path in paths:
            check_input(path)
        self._paths, self._names = paths, names
        self._maker = RowMaker(_labels(paths) if len(paths) > 1 else ())
        self._sizes = [path.stat().st_size if path.is_file() else None for path in paths]
        self._index = 0
        self._source = _open(paths[0], names)
        self._counter = _Counter(paths, names)

    def __iter__(self) -> Iterator[Row | RowFailure]:
        for index, path in enumerate(self._paths):
            if index:
                self._source.close()
                self._source, self._index = _open(path, self._names), index
            yield from self._rows(path)

    def _rows(self, path: Path) -> Iterator[Row | RowFailure]:
        source = self._source
        try:
            yield from self._maker.rows(source.unit, source.records())
        except (OSError, DamagedStream) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            last = self._maker.last
            where = f"after {source.unit} {last}" if last else "from its start"
            raise JobError(f"{shown_path(path)}: cannot be read {where} ({reason})") from error

    @property
    def total(self) -> int | None:
        """See `RowReader`."""
        return self._counter.count

    def left(self, read: int) -> int | None:
        """Rows still to be read, if they go on as they were so far."""
        sizes, index, share = self._sizes, self._index, self._source.share()
        if not read or share is None or None in sizes:
            return None
        known = [size for size in sizes if size is not None]
        position = sum(known[:index]) + share * known[index]
        return round(read * max(0.0, sum(known) - position) / max(1.0, position))

    def close(self) -> None:
        """See `RowReader`."""
        self._counter.close()
        self._source.close()


class _Counter:
    """Counts the rows of all inputs on a thread of its own, so that nothing waits for it."""

    def __init__(self, paths: Sequence[Path], names: ColumnNames) -> None:
        self._paths, self._names = paths, names
        self.count: int | None = None
        """None until they are counted, and where they cannot be."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="seesaw-count-rows", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the counting up, if it has not ended."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        total = 0
        try:
            for path in self._paths:
                count = self._count(path)
                if count is None:
                    return
                total += count
        except (OSError, JobError):
            return  # the reader of the rows meets the same error and reports it
        self.count = total

    def _count(self, path: Path) -> int | None:
        if self._stop.is_set() or not path.is_file():
            return None
        source = _open(path, self._names)
        try:
            return source.count(self._stop)
        finally:
            source.close()


def _open(path: Path, names: ColumnNames) -> Source:
    """Raises `JobError`."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetTable(path, names)
    stream = InputStream(path)
    try:
        if stream.head.startswith(b"PAR1") and path.is_file():
            stream.close()
            return ParquetTable(path, names)
        inner = path.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix
        if stream.head.startswith(b"PAR1") or inner == ".parquet":
            raise JobError(
                f"{shown_path(path)}: a Parquet file is read from a file of its own, not from a pipe or compressed"
            )
        delimiter = _DELIMITERS.get(inner)
        if delimiter is not None:
            return DelimitedTable(path, stream, names, delimiter)
        return JsonLines(path, stream, names)
    except BaseException:
        stream.close()
        raise


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names that tell the inputs apart: their file names, or their paths where two files share a name."""
    names = ["stdin" if path == STDIN else path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
