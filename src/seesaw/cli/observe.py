"""What watches a job while it runs: its record, and its metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seesaw.recording.bounded import History
from seesaw.recording.record import RunSetup, run_directory
from seesaw.recording.recorder import Counts, RunRecorder

if TYPE_CHECKING:
    from seesaw.jobs.base import JobEngine, JobOptions, JobProgress, JobSummary
    from seesaw.jobs.resume import OpenJob
    from seesaw.report.metrics import MetricsServer

logger = logging.getLogger(__name__)

OnProgress = Callable[["JobProgress"], None]


@contextmanager
def metrics_server(host: str, port: int | None) -> Iterator[MetricsServer | None]:
    """A metrics server, if a port is given. Raises `ConfigError` if it cannot be had."""
    if port is None:
        yield None
        return
    from seesaw.report.metrics import MetricsServer

    server = MetricsServer(host, port)
    logger.info("metrics at %s", server.url)
    try:
        yield server
    finally:
        server.close()


class Watch:
    """Keeps the counts of a job up to date, for those who watch it."""

    def __init__(
        self, recorder: RunRecorder | None, counts: Counts, directory: Path | None, before: tuple[int, int]
    ) -> None:
        """Rows that were answered and that had failed `before` are not this sitting's."""
        self.directory = directory
        """Of the record; None if none is kept."""
        self._recorder, self._counts, self._before = recorder, counts, before

    def noting(self, show: OnProgress) -> OnProgress:
        """`show`, after the counts were noted."""

        def progress(progress: JobProgress) -> None:
            counts = self._counts
            self._count(progress.rows_answered, progress.rows_failed)
            counts.total, counts.seconds = progress.rows_total, progress.elapsed_seconds
            show(progress)

        return progress

    def ended(self, summary: JobSummary) -> None:
        """The job has ended; the record is complete."""
        counts = self._counts
        self._count(summary.rows_answered, summary.rows_failed)
        counts.failures, counts.seconds = summary.failures, summary.elapsed_seconds
        if self._recorder is not None:
            self._recorder.close("interrupted" if summary.interrupted else "finished")

    def _count(self, answered: int, failed: int) -> None:
        self._counts.answered, self._counts.failed = answered - self._before[0], failed - self._before[1]


@contextmanager
def watching(
    engine: JobEngine, opened: OpenJob, options: dict[str, Any], metrics: MetricsServer | None
) -> Iterator[Watch]:
    """Watch the job that is run inside: write its record, serve its metrics.

    `options` are those of the command. If the job ends without `Watch.ended`, the record says that it failed.
    """
    job, counts = opened.options, Counts()
    before = opened.done.answered, opened.failures.total()
    if metrics is not None:
        metrics.watch(engine.stats, lambda: counts)
    directory = None if str(job.output) == "-" else run_directory(job.output_path)
    recorder = None if directory is None else _recorder(engine, job, options, directory)
    if recorder is not None:
        recorder.counts = counts
    try:
        yield Watch(recorder, counts, directory, before)
    except BaseException as error:
        if recorder is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            recorder.close("interrupted" if stopped else "failed", None if stopped else str(error))
        raise


def _recorder(engine: JobEngine, job: JobOptions, options: dict[str, Any], directory: Path) -> RunRecorder:
    from seesaw.recording.describe import describe, new_run

    def setup() -> RunSetup | None:
        deployment = getattr(engine, "deployment", None)
        return None if deployment is None else describe(deployment)

    given = {name: value for name, value in options.items() if value is not None}
    command = {
        "model": job.model,
        "input": [str(path) for path in job.inputs],
        "output": str(job.output_path),
        "limit": job.limit,
        "options": given,
    }
    return RunRecorder(
        directory,
        new_run(command),
        stats=engine.stats,
        history=getattr(engine, "history", History),
        setup=setup,
    )
