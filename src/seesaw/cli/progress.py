"""How a running job shows where it stands: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from seesaw.report.summary import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from seesaw.jobs.base import JobProgress

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0
_RATE_SECONDS = 10.0


class Rates:
    """Tokens per second in and out over the last seconds, and the time left."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()

    def update(self, progress: JobProgress) -> tuple[float, float]:
        """Take a sample; returns prompt and output tokens per second."""
        now = progress.elapsed_seconds
        self._samples.append((now, progress.stats.prompt_tokens, progress.stats.output_tokens))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_SECONDS:
            self._samples.popleft()
        first, last = self._samples[0], self._samples[-1]
        seconds = last[0] - first[0]
        if seconds <= 0:
            return 0.0, 0.0
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds


def seconds_left(progress: JobProgress) -> float | None:
    """Time left if rows go on at this session's average pace; None where nothing can be said yet."""
    done = progress.rows_answered + progress.rows_failed
    here = done - progress.rows_before
    if progress.rows_total is None or not progress.rows_answered or not here:
        return None
    return progress.elapsed_seconds * max(0, progress.rows_total - done) / here


def describe(progress: JobProgress, rates: tuple[float, float]) -> str:
    """One line: phase, rows, tokens per second, time left."""
    done = progress.rows_answered + progress.rows_failed
    total = "" if progress.rows_total is None else f"/{progress.rows_total:,}"
    left = seconds_left(progress)
    pieces = [
        progress.stats.phase,
        f"rows {done:,}{total}",
        f"failed {progress.rows_failed:,}",
        f"tokens/s {rates[0]:,.0f} in {rates[1]:,.0f} out",
        *([] if left is None else [f"left {format_seconds(left)}"]),
    ]
    return ", ".join(pieces)


@contextmanager
def showing() -> Iterator[Callable[[JobProgress], None]]:
    """A callback for `run_job` that shows progress on stderr."""
    if sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _log_lines()


def _log_lines(seconds: float = LOG_SECONDS) -> Callable[[JobProgress], None]:
    rates = Rates()
    due = time.monotonic() + seconds

    def show(progress: JobProgress) -> None:
        nonlocal due
        now_rates = rates.update(progress)
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            logger.info("%s", describe(progress, now_rates))

    return show


@contextmanager
def _bar() -> Iterator[Callable[[JobProgress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    rates = Rates()
    columns = (
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None, phase="")
        yield lambda progress: _update(bar, task, progress, rates.update(progress))


def _update(bar: Progress, task: TaskID, progress: JobProgress, rates: tuple[float, float]) -> None:
    phase, _, text = describe(progress, rates).partition(", ")
    done = progress.rows_answered + progress.rows_failed
    bar.update(task, description=text, phase=phase, completed=done, total=progress.rows_total)
