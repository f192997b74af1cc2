"""Whether the disk takes what a job will write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from seesaw.core.units import format_bytes
from seesaw.preflight.findings import Finding

JOURNAL_ROW_BYTES = 48
"""What the journal writes beside the output for a row, at most."""
_SPARE = 64 << 20
"""Free space below which others on the same disk are hurt."""


class Statistics(Protocol):
    """What is needed of `os.statvfs_result`."""

    @property
    def f_bavail(self) -> int: ...

    @property
    def f_frsize(self) -> int: ...


def check_space(
    path: Path,
    *,
    rows: int,
    least: float,
    most: float,
    written: int = 0,
    statvfs: Callable[[Path], Statistics] = os.statvfs,
) -> Finding | None:
    """Free disk at the folder of `path` against `rows` rows that are still to be written there.

    A row takes at least `least` bytes and is expected to take no more than `most`. `written` bytes of them stand
    there already and are not needed again. An `error` if even the least does not fit, a `warning` if it may not.
    """
    try:
        statistics = statvfs(path.parent)
    except OSError:
        return None  # `check_writable` says what is wrong
    free = statistics.f_bavail * statistics.f_frsize
    surely = rows * (least + JOURNAL_ROW_BYTES) - written
    perhaps = rows * (most + JOURNAL_ROW_BYTES) - written
    where = f"{path.parent} has {format_bytes(free)} free"
    remedy = "free some space, or write elsewhere with --output"
    if surely > free:
        what = f"disk: {rows:,} rows take at least {format_bytes(surely)} at {path}, and {where}"
        return Finding("error", what, remedy)
    if perhaps + min(_SPARE, perhaps) > free:
        what = f"disk: {rows:,} rows may take up to {format_bytes(perhaps)} at {path}, and {where}"
        return Finding("warning", what, f"{remedy}; a job that fills the disk stops and can be resumed")
    return None


def check_writable(folder: Path) -> Finding | None:
    """Really write a byte in `folder`, bring it to disk and remove it: quotas and read-only disks show here."""
    probe = folder / f".seesaw-{os.getpid()}.probe"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(probe)
    except OSError as error:
        what = f"disk: nothing can be written to {folder} ({error.strerror})"
        return Finding("error", what, "choose another place with --output")
    return None
