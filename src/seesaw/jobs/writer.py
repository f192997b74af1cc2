"""`JobWriter`: answers and failures made into lines, and made safe, on a thread of its own."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from seesaw.core.request import RequestOutput
from seesaw.jobs.base import Endpoint, RowFailure
from seesaw.jobs.journal import Kind
from seesaw.jobs.shapes import (
    ApiError,
    BatchError,
    BatchLine,
    BatchResponse,
    ErrorBody,
    response_body,
)
from seesaw.jobs.store import LineStore

logger = logging.getLogger(__name__)

_QUEUED = 1024
"""Most rows that wait to be written; more make the engine wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncWindow:
    """How much may be lost in a crash: rows are made safe in groups, when one of these is reached."""

    seconds: float = 1.0
    bytes: int = 8 << 20
    rows: int = 10_000


class Answer(msgspec.Struct, frozen=True):
    """The answer of a row. `top` is the number of alternatives its log-probabilities report."""

    number: int
    digest: int
    endpoint: Endpoint
    top: int
    output: RequestOutput
    extra: dict[str, Any] = {}
    """What passes through from the row."""


class LineMaker:
    """Lines of output and error files, in the shape of OpenAI's Batch output."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._encoder = msgspec.json.Encoder()
        self._session = secrets.token_hex(8)
        self._lines = 0

    def answer(self, row: Answer) -> bytes:
        """The line of an answered row."""
        serial = self._next_serial()
        body = response_body(
            row.endpoint,
            row.output,
            top=row.top,
            serial=serial,
            created=int(time.time()),
            model=self._model,
        )
        response = BatchResponse(200, f"req_{serial}", body)
        return self._line(serial, row.output.request_id, response, None, row.extra)

    def failure(self, failure: RowFailure) -> bytes:
        """The line of a failed row: a response with a status, or an error where it was no request."""
        serial = self._next_serial()
        if failure.status is None:
            error = BatchError(failure.code, failure.message)
            return self._line(serial, failure.id, None, error, failure.extra)
        kind = "server_error" if failure.status >= 500 else "invalid_request_error"
        body = ErrorBody(ApiError(failure.message, kind, failure.param, failure.code))
        response = BatchResponse(failure.status, f"req_{serial}", body)
        return self._line(serial, failure.id, response, None, failure.extra)

    def _next_serial(self) -> str:
        self._lines += 1
        return f"{self._session}{self._lines:08x}"

    def _line(
        self,
        serial: str,
        row_id: str,
        response: BatchResponse | None,
        error: BatchError | None,
        extra: dict[str, Any],
    ) -> bytes:
        line = BatchLine(f"batch_req_{serial}", row_id, response, error, extra or msgspec.UNSET)
        return self._encoder.encode(line) + b"\n"


class JobWriter:
    """Takes one answer or failure per row, and counts them; a thread makes lines of them and syncs them.

    `answer` and `fail` may be called from several threads. They wait while too many rows are queued, and raise
    what ended the thread: a `JobError` where a file cannot be written.
    """

    def __init__(self, store: LineStore, *, model: str, window: SyncWindow | None = None) -> None:
        self._store, self._window = store, window or SyncWindow()
        self._maker = LineMaker(model)
        self._queue: SimpleQueue[Answer | RowFailure | None] = SimpleQueue()
        """Bounded by `_wait_for_room`: a queue with a bound of its own takes several times as long for each row."""
        self._room = threading.Condition()
        self._waiting = False
        """Whether someone waits for `_room`."""
        self._error: BaseException | None = None
        self._closed = False
        self._ended = False
        """Whether the thread has met the end of the queue."""
        self.answered = 0
        """Rows with a line in the output; those of earlier sessions are the caller's to add."""
        self.failures: Counter[str] = Counter()
        """Rows with a line in the error file, by code, likewise."""
        self._thread = threading.Thread(target=self._work, name="seesaw-writer", daemon=True)
        self._thread.start()

    @property
    def safe(self) -> int:
        """Rows of this writer that no crash can lose."""
        return self._store.safe

    def answer(self, row: Answer) -> None:
        """Write the answer of a row."""
        self._put(row)

    def fail(self, failure: RowFailure) -> None:
        """Write the error line of a row."""
        self._put(failure)

    def _put(self, item: Answer | RowFailure) -> None:
        self._check()
        self._queue.put(item)
        if self._queue.qsize() > _QUEUED:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        with self._room:
            # The thread looks at `_waiting` behind each of the rows that are still to be taken until there is room.
            while self._queue.qsize() > _QUEUED // 2:
                self._waiting = True
                self._room.wait()

    def _next(self, timeout: float | None = None) -> Answer | RowFailure | None:
        """What is queued next. Raises `Empty`."""
        item = self._queue.get(timeout=timeout)
        if self._waiting and self._queue.qsize() <= _QUEUED // 2:
            with self._room:
                self._waiting = False
                self._room.notify_all()
        return item

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Make all rows safe and end the thread. Raises what went wrong; may be called twice."""
        self.stop()
        self._check()

    def stop(self) -> None:
        """The same without raising."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._take():
                self._store.sync()
        except BaseException as error:  # raised to whoever brings the next row
            self._error = error
            self._drain()

    def _take(self) -> bool:
        """Take rows until the window is full; False at the end."""
        window, rows, due = self._window, 0, None
        while rows < window.rows and self._store.waiting < window.bytes:
            try:
                item = self._next(None if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                return True
            if item is None:
                self._ended = True
                self._store.sync()
                return False
            self._write(item)
            rows += 1
            due = due or time.monotonic() + window.seconds
        return True

    def _write(self, item: Answer | RowFailure) -> None:
        if isinstance(item, Answer):
            self._store.add(Kind.ANSWER, item.number, item.digest, self._maker.answer(item))
            self.answered += 1
        else:
            self._store.add(Kind.ERROR, item.number, item.digest, self._maker.failure(item))
            self.failures[item.code] += 1

    def _drain(self) -> None:
        """Let those go on who wait for room in the queue, until the end."""
        while not self._ended:
            self._ended = self._next() is None
