"""Whether the files of a job can be used at all."""

from __future__ import annotations

import os
from pathlib import Path

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions
from seesaw.jobs.sources.open import check_input


def check_files(options: JobOptions) -> None:
    """Check that the job's files can be read and written. Raises `JobError`; changes nothing on disk."""
    for source in options.inputs:
        check_input(source)
    if options.streamed:
        _check_streamed(options)
        return
    output, errors = options.output_path, options.errors_path
    for source in options.inputs:
        _check_differ("output", output, "input", source)
        _check_differ("errors", errors, "input", source)
    _check_differ("errors", errors, "output", output)
    for path in (output, errors):
        _check_target(path)


def _check_streamed(options: JobOptions) -> None:
    """Standard output keeps nothing that could be put in order or gone back to."""
    for name, given in (("ordered", options.ordered), ("retry-errors", options.retry_errors)):
        if given:
            raise JobError(f"--{name} needs an output file; --output - gives each line away as it comes")
    if options.errors is not None:
        for source in options.inputs:
            _check_differ("errors", options.errors, "input", source)
        _check_target(options.errors)


def _check_differ(first: str, path: Path, second: str, other: Path) -> None:
    if os.path.realpath(path) == os.path.realpath(other):
        raise JobError(f"{path}: {first} and {second} are the same file; choose another name")


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise JobError(f"{path}: is a directory; expected the name of a file")
    if not path.parent.is_dir():
        raise JobError(f"{path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise JobError(f"{path}: the directory {path.parent} cannot be written to")
