"""Which format a file is written in, by its name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from seesaw.core.errors import JobError
from seesaw.jobs.base import COMPRESSED
from seesaw.jobs.sinks.base import Sink

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_REFUSED = {".xlsx", ".xls", ".feather", ".arrow", ".orc", ".avro", ".zip", ".bz2", ".xz"}


class _Format(NamedTuple):
    suffix: str
    """`.parquet`, `.csv`, `.tsv`; anything else means JSON lines."""
    compression: str | None


def is_plain(path: Path) -> bool:
    """Whether a file of this name holds the lines of a job as they are."""
    found = _format(path)
    return found.compression is None and found.suffix != ".parquet" and found.suffix not in _DELIMITERS


def check_format(path: Path) -> None:
    """Raise `JobError` if a file of this name cannot be written in the format that it names."""
    found = _format(path)
    if found.suffix in _REFUSED or (found.suffix == ".parquet" and found.compression):
        raise JobError(
            f"{path}: cannot be written in the format of that name; choose .jsonl, .csv, .tsv (also .gz and .zst) "
            "or .parquet"
        )


def open_sink(target: Path, *, name: Path | None = None) -> Sink:
    """Write `target` in the format that the suffix of `name` means, or of `target` itself if that is None.

    Raises `JobError` for a format that is not written, `OSError` if the file cannot be opened.
    """
    name = name or target
    check_format(name)
    suffix, compression = _format(name)
    if suffix == ".parquet":
        from seesaw.jobs.sinks.parquet import ParquetSink

        return ParquetSink(target)
    if suffix in _DELIMITERS:
        from seesaw.jobs.sinks.delimited import DelimitedSink

        return DelimitedSink(target, _DELIMITERS[suffix], compression)
    from seesaw.jobs.sinks.packed import JsonlSink

    return JsonlSink(target, compression)


def _format(path: Path) -> _Format:
    suffix = path.suffix.lower()
    compression = COMPRESSED.get(suffix)
    if compression is not None:
        suffix = path.with_suffix("").suffix.lower()
    return _Format(suffix, compression)
