"""How a command ends badly: errors and interruptions as one sentence and an exit code. Its log messages."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

from seesaw.core.errors import ConfigError, JobError, JobFilesError, SeesawError

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 3
"""Exit codes: a failure on the way; arguments or files that cannot be used; Ctrl-C, SIGTERM, or a failure after which
the same command goes on."""

logger = logging.getLogger(__name__)


class Command:
    """A running command."""

    def __init__(self) -> None:
        self.failure: int | None = None
        """Exit code of a failure once the work has begun: `INTERRUPTED` if the same command would go on with it."""
        self.hint = ""
        """A second line after an error or an interruption."""


@contextmanager
def reported(*, debug: bool) -> Iterator[Command]:
    """Turn exceptions into a sentence on stderr and an exit code, and SIGTERM into an interruption.

    With `debug`, the traceback precedes the sentence.
    """
    command = Command()
    with _sigterm_interrupts():
        try:
            yield command
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _end("interrupted", command)
            raise typer.Exit(INTERRUPTED) from None
        except SeesawError as error:
            _show_traceback(debug)
            _end(f"error: {error}", command)
            raise typer.Exit(_exit_code(error, command)) from None
        except Exception as error:  # nothing but a bug comes here
            _show_traceback(debug)
            hint = "" if debug else "; --debug shows where"
            _end(f"internal error: {type(error).__name__}: {error}{hint}", command)
            raise typer.Exit(_exit_code(error, command)) from None


def _exit_code(error: Exception, command: Command) -> int:
    if isinstance(error, (ConfigError, JobFilesError)):
        return UNUSABLE
    if command.failure is not None:
        return command.failure
    return UNUSABLE if isinstance(error, JobError) else FAILED


def set_up_logging(*, debug: bool) -> None:
    """Write the log messages of Seesaw to stderr; those of level DEBUG only with `debug`."""
    package = logging.getLogger("seesaw")
    package.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in [h for h in package.handlers if isinstance(h, _Echo)]:
        package.removeHandler(handler)
    echo = _Echo()
    detailed = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    echo.setFormatter(logging.Formatter(detailed if debug else "%(message)s"))
    package.addHandler(echo)


def say(message: str) -> None:
    """One line on stderr."""
    typer.echo(message, err=True)


class _Echo(logging.Handler):
    """Writes to what `sys.stderr` is at the moment; a progress bar replaces it, to stay below the text."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a closed terminal must not end the job
            say(self.format(record))


def _end(message: str, command: Command) -> None:
    say(message)
    if command.hint:
        say(command.hint)


def _show_traceback(debug: bool) -> None:
    if debug:
        logger.error("the command failed", exc_info=True)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
