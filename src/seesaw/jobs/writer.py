"""Output and error files of a job, in the shape of OpenAI's Batch output.

Lines go to `OUTPUT.part` and `ERRORS.part` as rows are finished; `commit` renames them into place.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from seesaw.core.errors import JobError
from seesaw.core.request import RequestOutput
from seesaw.jobs.base import Endpoint, RowFailure
from seesaw.jobs.shapes import (
    ApiError,
    BatchError,
    BatchLine,
    BatchResponse,
    ErrorBody,
    response_body,
)
from seesaw.jobs.sinks.open import finish

logger = logging.getLogger(__name__)

_BUFFER = 1 << 20
_FLUSH_SECONDS = 1.0


def part_path(path: Path) -> Path:
    """Where the lines of `path` stand until the job is done."""
    return path.with_name(path.name + ".part")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(f"{path}: cannot be written ({error.strerror})") from error


class _PartFile:
    """A file that grows under a temporary name. Holds a lock, so that two jobs cannot write it at once."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, part_path(path)
        self._flushed = time.monotonic()
        with _writing(self.part):
            self._file: BinaryIO = open(self.part, "ab", buffering=_BUFFER)  # noqa: SIM115
            self._lock()
            if self._file.tell():
                logger.warning("%s, left by a job that did not end, is overwritten", self.part)
                self._file.truncate(0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A job that ended just now may have renamed the file that was opened.
            ours = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.part))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            self._file.close()
            raise JobError(f"{self.part}: another job is writing it; choose another output")

    def write(self, line: bytes) -> None:
        with _writing(self.part):
            self._file.write(line)
            now = time.monotonic()
            if now - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now

    def close(self) -> None:
        """Make what was written durable under the temporary name."""
        if not self._file.closed:
            with _writing(self.part):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def commit(self) -> None:
        self.close()
        with _writing(self.path):
            finish(self.part, self.path)


class JobWriter:
    """Writes one line per row, each to the output or to the error file, and counts them.

    The error file is created with the first failed row. `answer` and `fail` may be called from several
    threads. Raises `JobError` where a file cannot be written.
    """

    def __init__(self, output: Path, errors: Path, *, model: str) -> None:
        self._model = model
        self._errors_path = errors
        self._output = _PartFile(output)
        with _writing(errors):
            part_path(errors).unlink(missing_ok=True)  # of an earlier job that did not end
        self._errors: _PartFile | None = None
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        self._job = secrets.token_hex(8)
        self._lines = 0
        self.answered = 0
        """Lines in the output file."""
        self.failures: Counter[str] = Counter()
        """Lines in the error file, by code."""

    @property
    def failed(self) -> int:
        """Lines in the error file."""
        return self.failures.total()

    def answer(
        self, output: RequestOutput, endpoint: Endpoint, *, top: int = 0, extra: dict[str, Any] | None = None
    ) -> None:
        """Write the answer of a row; `top` is the number of alternatives its log-probabilities report.

        `extra` is what passes through from the row (`Row.extra`).
        """
        with self._lock:
            serial = self._next_serial()
            body = response_body(
                endpoint, output, top=top, serial=serial, created=int(time.time()), model=self._model
            )
            response = BatchResponse(200, f"req_{serial}", body)
            line = self._line(serial, output.request_id, response, None, extra)
            self._output.write(line)
            self.answered += 1

    def fail(self, failure: RowFailure) -> None:
        """Write the error line of a row: a response with a status, or an error where it was no request."""
        with self._lock:
            serial = self._next_serial()
            if failure.status is None:
                error = BatchError(failure.code, failure.message)
                line = self._line(serial, failure.id, None, error, failure.extra)
            else:
                kind = "server_error" if failure.status >= 500 else "invalid_request_error"
                body = ErrorBody(ApiError(failure.message, kind, failure.param, failure.code))
                response = BatchResponse(failure.status, f"req_{serial}", body)
                line = self._line(serial, failure.id, response, None, failure.extra)
            if self._errors is None:
                self._errors = _PartFile(self._errors_path)
            self._errors.write(line)
            self.failures[failure.code] += 1

    def commit(self) -> None:
        """Make both files durable and give them their names, the error file first.

        So an output file under its name means that the job is done. Without failed rows, an error file of an
        earlier job is removed.
        """
        self.close()
        if self._errors is not None:
            self._errors.commit()
        with _writing(self._errors_path):
            if self._errors is None:
                self._errors_path.unlink(missing_ok=True)
            self._output.commit()
            for folder in {self._errors_path.parent, self._output.path.parent}:
                _sync_folder(folder)

    def close(self) -> None:
        """Make what was written durable in the `.part` files and leave them there."""
        with self._lock:
            for file in (self._output, self._errors):
                if file is not None:
                    file.close()

    def _next_serial(self) -> str:
        self._lines += 1
        return f"{self._job}{self._lines:08x}"

    def _line(
        self,
        serial: str,
        row_id: str,
        response: BatchResponse | None,
        error: BatchError | None,
        extra: dict[str, Any] | None,
    ) -> bytes:
        line = BatchLine(f"batch_req_{serial}", row_id, response, error, extra or msgspec.UNSET)
        return self._encoder.encode(line) + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
