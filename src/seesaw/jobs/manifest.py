"""`OUTPUT.manifest.json`: what a job was asked for, how far it is, and how it went."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import msgspec

import seesaw
from seesaw.core.errors import JobFilesError
from seesaw.jobs.disk import Disk, reading, writing
from seesaw.jobs.fingerprint import Fingerprint

_FORMAT = 1


class Session(msgspec.Struct, kw_only=True):
    """One command's work on a job."""

    started: str
    """UTC, as ISO 8601."""
    seconds: float | None = None
    """How long it lasted; None if it did not live to say."""
    rows_before: int
    """Rows that were done when it began."""
    plan: str | None = None
    seesaw: str = seesaw.__version__


class Manifest(msgspec.Struct, kw_only=True):
    """Of a job. Counts are those of the end of the last session that had one."""

    format: int = _FORMAT
    job: str
    """The job's number, in hexadecimal; its journal bears it too."""
    state: Literal["running", "finishing", "complete"] = "running"
    """`finishing`: all rows are done, and the files are being given their names."""
    round: int = 0
    """How often failed rows were run again."""
    ordered: bool = False
    """Whether the output is in the order of the input; settled when the job is finishing."""
    output: str
    errors: str
    rows_answered: int = 0
    rows_failed: int = 0
    failures: dict[str, int] = {}
    """Failed rows by code."""
    output_bytes: int | None = None
    errors_bytes: int | None = None
    """Sizes of the finished files."""
    fingerprint: Fingerprint
    started: str
    ended: str | None = None
    sessions: list[Session] = []

    @property
    def exit_code(self) -> int:
        """Of a job that is complete."""
        return 1 if self.rows_failed else 0


def now() -> str:
    """The time, UTC, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, or None if there is none. Raises `JobFilesError` if it cannot be understood."""
    if not path.exists():
        return None
    try:
        with reading(path):
            data = path.read_bytes()
        manifest = msgspec.json.decode(data, type=Manifest)
        int(manifest.job, 16)
    except (msgspec.DecodeError, ValueError) as error:
        raise JobFilesError(
            f"{path}: is not a manifest that this version of Seesaw reads ({error}); choose another --output, or "
            "--force to start again"
        ) from error
    if manifest.format != _FORMAT:
        raise JobFilesError(
            f"{path}: has format {manifest.format}, this version of Seesaw reads {_FORMAT}; finish the job with "
            "the version that began it, or choose another --output"
        )
    return manifest


def write_manifest(path: Path, manifest: Manifest, disk: Disk) -> None:
    """Replace the manifest, as a whole. Raises `JobError`."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    with writing(path):
        disk.write_whole(path, data + b"\n")
