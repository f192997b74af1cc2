"""`run_job`: a job file through an engine into its output files."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from seesaw.core.errors import EngineError, JobFilesError, RequestError
from seesaw.core.request import Request, RequestOutput
from seesaw.core.stats import EngineStats
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
from seesaw.jobs.encoding.pool import EncoderPool, encoder_pool, spare_processes
from seesaw.jobs.encoding.source import EncodedRow, EncodedRows, RefusedRow
from seesaw.jobs.requests import INTERNAL_ERROR, MODEL_NOT_FOUND, ModelNames, RequestMaker
from seesaw.jobs.resume import OpenJob, open_job
from seesaw.jobs.sources.open import open_rows
from seesaw.jobs.writer import Answer, JobWriter, SyncWindow

logger = logging.getLogger(__name__)

_STATUS = {MODEL_NOT_FOUND: 404, INTERNAL_ERROR: 500}
"""HTTP status by code of a `RequestError`; all others are 400."""

POOL_FROM_ROWS = 1000
"""From this row on prompts are tokenised by other processes, which take more than a second to come up."""

_YOUNG_OBJECTS = 50_000
"""More objects than the steps of a job make and end again: only then is it worth to look for garbage among them."""

OnProgress = Callable[[JobProgress], None]


def run_job(engine: JobEngine, options: JobOptions, *, on_progress: OnProgress | None = None) -> JobSummary:
    """Run a job from where its files say it stands to its end; see `run_opened`.

    Where it is complete, nothing runs, and the summary is that of its end. Raises `JobError` for files that
    cannot be read or written, `JobFilesError` where they belong to something else.
    """
    with open_job(options) as job:
        if job.complete:
            return complete_summary(job, engine.stats())
        return run_opened(engine, job, on_progress=on_progress)


def run_opened(
    engine: JobEngine,
    job: OpenJob,
    *,
    on_progress: OnProgress | None = None,
    window: SyncWindow | None = None,
) -> JobSummary:
    """Run the rows of a job that are not done; each becomes exactly one line of the output or of the error file.

    Lines are in order of completion, and stand in `OUTPUT.part` until the job is done; the journal beside it
    makes them safe in groups, as `window` says. `on_progress` is called from a thread of its own every
    `options.progress_seconds`. After an interruption (Ctrl-C) the summary says so, and what was answered stays,
    as it does when an error is raised; the next run goes on from there.
    Raises `JobError` for files that cannot be read or written, `EngineError` where the engine fails.
    """
    with closing(open_rows(job.options)) as source, _settled_heap():
        return _Run(engine, job, source).execute(on_progress, window)


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Python looks for garbage less often, and among what is made meanwhile alone.

    Rows in flight are many objects, and no garbage; what was loaded before them is far more, and stays.
    """
    first, *later = gc.get_threshold()
    frozen = gc.get_freeze_count() > 0  # by the caller, who may not want it undone
    gc.set_threshold(max(first, _YOUNG_OBJECTS) if first else 0, *later)
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        gc.set_threshold(first, *later)


def complete_summary(job: OpenJob, stats: EngineStats) -> JobSummary:
    """The summary of a job that is complete."""
    manifest, options = job.manifest, job.options
    assert manifest is not None
    return JobSummary(
        rows_answered=manifest.rows_answered,
        rows_failed=manifest.rows_failed,
        rows_before=manifest.rows_answered + manifest.rows_failed,
        failures=manifest.failures,
        elapsed_seconds=0.0,
        interrupted=False,
        output=options.output_path,
        errors=options.errors_path if manifest.rows_failed else None,
        stats=stats,
    )


class _Pending(msgspec.Struct, frozen=True, gc=False):
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
    job: OpenJob
    source: RowReader
    _pending: dict[str, _Pending] = field(default_factory=dict)
    _rows: int = 0
    """Read so far."""
    _encoded: EncodedRows | None = None
    """What is read ahead."""
    _skipped: int = 0
    """Of these, done before."""
    _changed: int = 0
    """Of these, not what they were then."""
    _started: float = field(default_factory=time.monotonic)
    _writer: JobWriter = field(init=False)

    @property
    def options(self) -> JobOptions:
        """What was asked for."""
        return self.job.options

    def execute(self, on_progress: OnProgress | None, window: SyncWindow | None) -> JobSummary:
        """Run the job to its end or to an interruption."""
        options = self.options
        model = options.served_model_name or options.model
        self._writer = JobWriter(self.job.start(), model=model, window=window)
        ticker = None
        if on_progress is not None:
            ticker = _Ticker(lambda: on_progress(self._progress(self.source.total)), options.progress_seconds)
        interrupted = False
        try:
            self._answer_all()
            self._writer.close()
            self._check_skipped()
            self.job.finish(self.engine.stats().plan, self._answered, self._failures)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if ticker is not None:
                ticker.close()
            self._pause()
        self._writer.close()
        return self._summary(interrupted)

    def _pause(self) -> None:
        """Save what can be saved."""
        self._writer.stop()
        self.job.safe = len(self.job.done) + self._writer.safe
        if not self.job.complete:
            self.job.pause(self.engine.stats().plan, self._answered, self._failures)

    @property
    def _answered(self) -> int:
        return self.job.done.answered + self._writer.answered

    @property
    def _failures(self) -> Counter[str]:
        return self.job.failures + self._writer.failures

    def _check_skipped(self) -> None:
        if self._changed:
            logger.warning(
                "%d rows changed since they were done; they keep what they were given", self._changed
            )

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
                self._writer.answer(Answer(row.number, row.digest, row.endpoint, row.top, output, row.extra))
        if self._pending:
            raise EngineError(
                f"the engine ended without an answer to {len(self._pending)} rows; this is a bug"
            )

    def _left(self) -> int | None:
        """Rows that are still to be run; None where nothing can be said."""
        left, limit = self.source.left(self._rows), self.options.limit
        if left is None:
            return None
        if limit is not None:
            left = min(left, limit - self._rows)
        ahead = 0 if self._encoded is None else self._encoded.rows_ahead
        return max(0, left + ahead - (len(self.job.done) - self._skipped))

    def _requests(self) -> Iterator[Request]:
        """The requests of all rows that are not done. Here rows become requests."""
        names = ModelNames(self.options.model, self.options.served_model_name)
        maker = RequestMaker(
            self.engine.tokenizer,
            self.engine.max_model_len,
            names,
            self.options.sampling_defaults,
            self.options.max_tokens,
        )
        pool = encoder_pool(self.engine.tokenizer, spare_processes(self.engine.busy_cores))
        with EncodedRows(self._undone(maker, pool), maker, pool) as self._encoded:
            for item in self._encoded:
                match item:
                    case EncodedRow(row, request):
                        top = request.sampling.logprobs or 0
                        self._pending[row.id] = _Pending(
                            row.number, row.place, row.digest, row.endpoint, top, row.extra
                        )
                        yield request
                    case RefusedRow(row, error):
                        self._refuse(row, row.id, error)
                    case _:
                        self._writer.fail(item)

    def _undone(self, maker: RequestMaker, pool: EncoderPool | None) -> Iterator[Row | RowFailure]:
        """The rows that have no line yet. Where there are many, `pool` is started."""
        for row in islice(self.source, self.options.limit):
            self._rows += 1
            if not self._is_done(row):
                if pool is not None and self._rows - self._skipped == POOL_FROM_ROWS:
                    pool.start()
                yield row
            elif isinstance(row, Row):
                maker.skip(row)

    def _is_done(self, row: Row | RowFailure) -> bool:
        """Whether the row has its line. Raises `JobFilesError` where it is not the row that was done."""
        digest = self.job.done.digest(row.number)
        if digest is None:
            return False
        self._skipped += 1
        if digest != row.digest:
            self._changed += 1
            if not self.options.force:
                place = row.place if isinstance(row, Row) else f"row {row.number}"
                raise JobFilesError(
                    f"{place}: the row {row.id!r} is not what it was when it was done; bring the input back, choose "
                    "another --output, or --force to go on with what changed rows were given then"
                )
        return True

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
            rows_answered=self._answered,
            rows_failed=self._failures.total(),
            rows_before=len(self.job.done),
            rows_total=total if total is None or limit is None else min(total, limit),
            elapsed_seconds=time.monotonic() - self._started,
            stats=self.engine.stats(),
        )

    def _summary(self, interrupted: bool) -> JobSummary:
        files, failures = self.job.files, self._failures
        output, errors = files.output, files.errors
        if interrupted and not self.options.streamed:
            output, errors = files.answers_part, files.errors_part
        return JobSummary(
            rows_answered=self._answered,
            rows_failed=failures.total(),
            rows_before=len(self.job.done),
            failures=dict(failures.most_common()),
            elapsed_seconds=time.monotonic() - self._started,
            interrupted=interrupted,
            output=output,
            errors=errors if failures and not self.job.errors_streamed else None,
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
