"""`Sink`: takes the lines of an output or error file and writes them in a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Sink(ABC):
    """Writes one file, which is whole once its context is left without an error.

    All methods raise `OSError` where the file cannot be written.
    """

    @abstractmethod
    def write(self, line: bytes) -> None:
        """Take a line of an output or error file (`shapes.BatchLine`), with its line end."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and make the file durable. May be called twice."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the file, whole or not. May be called twice; raises nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()
