"""`run_job`: a job file through an engine into its output files."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from seesaw.core.errors import EngineError, JobError, RequestError
from seesaw.core.request import Request, RequestOutput
from seesaw.jobs.base import (
    Endpoint,
    JobEngine,
    JobOptions,
    JobProgress,
    JobSummary,
    Row,
    RowFailure,
    RowReader,
)
from seesaw.jobs.requests import MODEL_NOT_FOUND, ModelNames, RequestMaker
from seesaw.jobs.sources.open import check_input, open_rows
from seesaw.jobs.writer import JobWriter, part_path

logger = logging.getLogger(__name__)

_STATUS = {MODEL_NOT_FOUND: 404, "internal_error": 500}
"""HTTP status by code of a `RequestError`; all others are 400."""

OnProgress = Callable[[JobProgress], None]


def check_files(options: JobOptions) -> None:
    """Check that the job's files can be read and written. Raises `JobError`; changes nothing on disk."""
    output, errors = options.output_path, options.errors_path
    for source in options.inputs:
        check_input(source)
        _check_differ("output", output, "input", source)
        _check_differ("errors", errors, "input", source)
    _check_differ("errors", errors, "output", output)
    for path in (output, errors):
        _check_target(path)


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


def run_job(engine: JobEngine, options: JobOptions, *, on_progress: OnProgress | None = None) -> JobSummary:
    """Run every row of a job file; each becomes exactly one line of the output or of the error file.

    Lines are in order of completion, and stand in `OUTPUT.part` until the job is done. `on_progress` is
    called from a thread of its own every `options.progress_seconds`. After an interruption (Ctrl-C) the
    summary says so, and what was answered stays in the `.part` files, as it does when an error is raised.
    Raises `JobError` for files that cannot be read or written, `EngineError` where the engine fails.
    """
    check_files(options)
    with closing(open_rows(options)) as source:
        return _Run(engine, options, source).execute(on_progress)


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is kept of a row while the engine has it: how to answer it."""

    number: int
    place: str
    digest: int
    endpoint: Endpoint
    top: int
    extra: dict[str, Any]


@dataclass(slots=True)
class _Run:
    """One run of a job.

    The engine pulls `_requests`, perhaps on a thread of its own, while this thread takes its outputs; they
    share `_pending` (one side inserts, the other removes) and the writer, which locks.
    """

    engine: JobEngine
    options: JobOptions
    source: RowReader
    _pending: dict[str, _Pending] = field(default_factory=dict)
    _rows: int = 0
    """Read so far."""
    _started: float = field(default_factory=time.monotonic)
    _writer: JobWriter = field(init=False)

    def execute(self, on_progress: OnProgress | None) -> JobSummary:
        """Run the job to its end or to an interruption."""
        options = self.options
        model = options.served_model_name or options.model
        self._writer = JobWriter(options.output_path, options.errors_path, model=model)
        ticker = None
        if on_progress is not None:
            ticker = _Ticker(lambda: on_progress(self._progress(self.source.total)), options.progress_seconds)
        interrupted = False
        try:
            self._answer_all()
            self._writer.commit()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if ticker is not None:
                ticker.close()
            self._writer.close()
        return self._summary(interrupted)

    def _answer_all(self) -> None:
        outputs = self.engine.run(_Expected(self._requests(), self._left))
        try:
            self._take(outputs)
        finally:
            if isinstance(outputs, Generator):
                outputs.close()  # lets the engine come to rest before its statistics are read

    def _take(self, outputs: Iterator[RequestOutput]) -> None:
        for output in outputs:
            row = self._pending.pop(output.request_id, None)
            if row is None:
                raise EngineError(f"the engine answered row {output.request_id!r} twice; this is a bug")
            if output.error is not None:
                self._refuse(row, output.request_id, output.error)
            else:
                self._writer.answer(output, row.endpoint, top=row.top, extra=row.extra)
        if self._pending:
            raise EngineError(
                f"the engine ended without an answer to {len(self._pending)} rows; this is a bug"
            )

    def _left(self) -> int | None:
        """Rows that are still to be read; None where nothing can be said."""
        left, limit = self.source.left(self._rows), self.options.limit
        return left if left is None or limit is None else min(left, limit - self._rows)

    def _requests(self) -> Iterator[Request]:
        names = ModelNames(self.options.model, self.options.served_model_name)
        maker = RequestMaker(self.engine.tokenizer, self.engine.max_model_len, names)
        for row in islice(self.source, self.options.limit):
            self._rows += 1
            if isinstance(row, RowFailure):
                self._writer.fail(row)
            else:
                yield from self._request(maker, row)

    def _request(self, maker: RequestMaker, row: Row) -> Iterator[Request]:
        try:
            request = maker.make(row)
        except RequestError as error:
            self._refuse(row, row.id, error)
            return
        top = request.sampling.logprobs or 0
        self._pending[row.id] = _Pending(row.number, row.place, row.digest, row.endpoint, top, row.extra)
        yield request

    def _refuse(self, row: Row | _Pending, row_id: str, error: RequestError) -> None:
        self._writer.fail(
            RowFailure(
                number=row.number,
                digest=row.digest,
                id=row_id,
                code=error.code,
                message=f"{row.place}: {error}",
                param=error.param,
                status=_STATUS.get(error.code, 400),
                extra=row.extra,
            )
        )

    def _progress(self, total: int | None) -> JobProgress:
        limit = self.options.limit
        return JobProgress(
            rows_answered=self._writer.answered,
            rows_failed=self._writer.failed,
            rows_total=total if total is None or limit is None else min(total, limit),
            elapsed_seconds=time.monotonic() - self._started,
            stats=self.engine.stats(),
        )

    def _summary(self, interrupted: bool) -> JobSummary:
        writer, options = self._writer, self.options
        output, errors = options.output_path, options.errors_path
        if interrupted:
            output, errors = part_path(output), part_path(errors)
        return JobSummary(
            rows_answered=writer.answered,
            rows_failed=writer.failed,
            failures=dict(writer.failures.most_common()),
            elapsed_seconds=time.monotonic() - self._started,
            interrupted=interrupted,
            output=output,
            errors=errors if writer.failed else None,
            stats=self.engine.stats(),
        )


class _Expected(Iterator[Request]):
    """Requests, with a length hint for an engine that plans ahead."""

    def __init__(self, requests: Iterator[Request], left: Callable[[], int | None]) -> None:
        self._requests, self._left = requests, left

    def __next__(self) -> Request:
        return next(self._requests)

    def __length_hint__(self) -> int:
        left = self._left()
        return NotImplemented if left is None else left


class _Ticker:
    """Calls a function at intervals on a thread of its own, and once more when it is closed."""

    def __init__(self, call: Callable[[], None], seconds: float) -> None:
        self._call, self._seconds = call, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="seesaw-progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(self._seconds)
            try:
                self._call()
            except Exception:  # a display that fails must not end the job it shows
                logger.debug("the progress report failed", exc_info=True)
