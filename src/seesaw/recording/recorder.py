"""`RunRecorder`: watches a job from a thread of its own and keeps its record on disk up to date."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from seesaw.core.errors import ConfigError
from seesaw.core.stats import EngineStats, TransitionRecord
from seesaw.recording.bounded import History, Thinned
from seesaw.recording.record import MOST_RUNS, RECORD, Record, Run, RunSetup, Sample, load_record, save_record

logger = logging.getLogger(__name__)

_SAMPLES, _TRANSITIONS = 2000, 2000
"""At most so many are kept."""
_FIRST_SECONDS = 0.05
"""Between two samples, until there are too many; then twice that, and so on."""
_WRITE_SECONDS = 30.0


@dataclass(slots=True)
class Counts:
    """Rows of a job so far, as its progress tells them."""

    answered: int = 0
    failed: int = 0
    total: int | None = None
    failures: dict[str, int] | None = None
    seconds: float = 0.0


class RunRecorder:
    """Samples a job's engine and writes the record now and then, and at the end.

    The thread calls `stats`, `history` and `setup` until `close`; a record that cannot be written is given up with a
    warning, since the job matters more.
    """

    def __init__(
        self,
        directory: Path,
        run: Run,
        *,
        stats: Callable[[], EngineStats],
        history: Callable[[], History],
        setup: Callable[[], RunSetup | None],
    ) -> None:
        self.counts = Counts()
        """Kept up to date by the job."""
        self._directory, self._run = directory, run
        self._stats, self._history, self._setup = stats, history, setup
        self._earlier = _earlier(directory, run)
        self._samples: Thinned[Sample] = Thinned(_SAMPLES)
        self._transitions: Thinned[TransitionRecord] = Thinned(_TRANSITIONS)
        self._bytes = self._seen = 0
        self._writable = True
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._work, name="seesaw-recorder", daemon=True)
        self._thread.start()

    def close(self, state: str, error: str | None = None) -> None:
        """Take the last sample and write the record. May be called twice; the first state stays."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._run.state, self._run.error = state, error
        self._sample()
        self._write()

    def _work(self) -> None:
        due = time.monotonic() + _WRITE_SECONDS
        try:
            while not self._stop.wait(_FIRST_SECONDS * self._samples.every):
                self._sample()
                if time.monotonic() >= due:
                    due = time.monotonic() + _WRITE_SECONDS
                    self._write()
        except Exception:  # a record that fails must not end the job it is of
            logger.warning("the record in %s is not kept any longer", self._directory, exc_info=True)

    def _sample(self) -> None:
        stats, run = self._stats(), self._run
        if not run.plans or run.plans[-1][1] != stats.plan:
            run.plans.append((stats.elapsed_seconds, stats.plan))
        for record in stats.transitions[self._seen :]:
            self._transitions.add(record)
            self._bytes += record.bytes
        self._seen = len(stats.transitions)
        run.stats = replace(stats, transitions=())
        sample = Sample(
            at=stats.elapsed_seconds,
            phase=stats.phase,
            rows=stats.requests_finished,
            prompt_tokens=stats.prompt_tokens_fed,
            output_tokens=stats.tokens_sampled,
            host_kv=stats.host_kv_used_bytes,
            device_kv=stats.device_kv_used_bytes,
            running=stats.requests_running,
            waiting=stats.requests_waiting,
        )
        self._samples.keep(sample)

    def _write(self) -> None:
        if not self._writable:
            return
        run, counts = self._run, self.counts
        run.written = now()
        run.setup = self._setup()
        run.rows_answered, run.rows_failed, run.rows_total = counts.answered, counts.failed, counts.total
        run.failures, run.elapsed_seconds = dict(counts.failures or {}), counts.seconds
        run.timeline, run.transitions = self._samples.items, self._transitions.items
        run.transition_count, run.transition_bytes = self._seen, self._bytes
        run.history = self._history()
        try:
            save_record(self._directory, Record(runs=[*self._earlier, run]))
        except OSError as error:
            self._writable = False
            logger.warning("the run is not recorded in %s: %s", self._directory, error.strerror)


def now() -> str:
    """The time of day, ISO 8601 with time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _earlier(directory: Path, run: Run) -> list[Run]:
    """Earlier sittings of the job that `run` goes on with: none if the last one came to its end."""
    if not (directory / RECORD).exists():
        return []
    try:
        runs = load_record(directory).runs
    except ConfigError as error:
        logger.warning("%s; it is replaced", error)
        return []
    if not runs or runs[-1].state == "finished" or runs[-1].command.get("input") != run.command.get("input"):
        return []
    return runs[1 - MOST_RUNS :]
