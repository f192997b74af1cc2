"""`Executor`: what carries out the scheduler's actions."""

from __future__ import annotations

from typing import Protocol

from seesaw.core.actions import Action, Completion


class Executor(Protocol):
    """Carries actions out asynchronously, in the order `core.actions` promises."""

    def submit(self, action: Action) -> None:
        """Take an action in; returns at once."""

    def wait(self) -> list[Completion]:
        """Completions since the last call; blocks until there is one. Raises `WorkerError` if a rank failed."""
        ...

    def close(self) -> None:
        """End all ranks and free what they held. May be called twice."""
