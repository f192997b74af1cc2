"""A contestant or probe as a process: JSON lines in both directions, kept still while others are measured."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from seesaw.bench import sessions
from seesaw.core.errors import SeesawError

_TAIL = 4000
"""Bytes of a process's messages that are looked through for its last words."""


class ContestantError(SeesawError):
    """A contestant that failed, died or gave no answer in time. The others go on."""


class Guard:
    """Kills the sessions it was told of when this process ends, however it ends. See `sessions`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", sessions.__file__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def tell(self, word: str, session: int) -> None:
        """`add` or `drop` a session."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word} {session}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End what is left of the sessions, and the guard."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonProcess:
    """A process in a session of its own that answers each JSON line on its standard input by one.

    Owns the session: `close` ends all of it. What the processes say goes to the file `log`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        guard: Guard,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._guard, self._log = guard, log
        with log.open("ab") as messages:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.session = self._process.pid
        guard.tell("add", self.session)
        self._received = b""
        self.frozen = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a message over. Raises `ContestantError` if the process is gone."""
        assert self._process.stdin is not None and not self.frozen
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise ContestantError(self._epitaph()) from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer. Raises `ContestantError` on an error message, on death, or after `timeout` seconds."""
        line = self._line(time.monotonic() + timeout)
        if line is None:
            raise ContestantError(self._epitaph())
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "error":
            raise ContestantError(message["message"])
        return message

    def ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """`send`, then `receive`."""
        self.send(message)
        return self.receive(timeout)

    def freeze(self) -> None:
        """Stop the whole session: it costs nothing while others are measured."""
        if not self.frozen:
            sessions.stop(self.session)
            self.frozen = True

    def thaw(self) -> None:
        """Let the session go on."""
        if self.frozen:
            sessions.resume(self.session)
            self.frozen = False

    def close(self, patience: float = 20.0) -> None:
        """Ask the process to end, then end whatever is left of its session. May be called twice."""
        self.thaw()
        with suppress(ContestantError):
            self.send({"op": "close"})
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()
        self._process.stdout.close()

    def kill(self) -> None:
        """End the session at once."""
        sessions.kill(self.session)
        self._process.wait(timeout=10)
        self._guard.tell("drop", self.session)

    def _line(self, deadline: float) -> bytes | None:
        """The next line, or None at the end of the stream."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise ContestantError("gave no answer in time; " + self._last_words())
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    return None
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _epitaph(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        how = "closed its output" if code is None else f"ended by {_signal(-code)}" if code < 0 else None
        return f"{how or f'ended with exit code {code}'}; {self._last_words()}"

    def _last_words(self) -> str:
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next(
            (f"its last message was: {line[:300]}" for line in reversed(lines) if line), "it said nothing"
        )


def _signal(number: int) -> str:
    import signal

    return signal.Signals(number).name
