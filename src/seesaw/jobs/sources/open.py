"""The inputs of a job, opened as one source of rows."""

from __future__ import annotations

from pathlib import Path

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions, RowReader
from seesaw.jobs.sources.jsonl import JsonLines, open_binary


def check_input(path: Path) -> None:
    """Raise `JobError` if `path` cannot be read."""
    if path.is_dir():
        raise JobError(f"{path}: is a directory; expected a JSONL file")
    if path.is_file() or not path.exists():  # opening a pipe to look at it would break it
        open_binary(path).close()


def open_rows(options: JobOptions) -> RowReader:
    """The rows of a job. Raises `JobError` if an input cannot be opened."""
    if len(options.inputs) != 1:
        raise JobError(f"{len(options.inputs)} inputs were given; give one")
    return JsonLines(options.inputs[0])
