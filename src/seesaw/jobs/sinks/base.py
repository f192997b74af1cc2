"""`Sink`: takes the lines of an output or error file and writes them in a format."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class Sink(Protocol):
    """Writes one file. Leaving its context closes it; after an error the file is not whole.

    All methods raise `OSError` where the file cannot be written.
    """

    def write(self, line: bytes) -> None:
        """Take a line of an output or error file (`shapes.BatchLine`), with its line end."""
        ...

    def close(self) -> None:
        """Write what is left and make the file durable. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingSink:
    """A sink that is closed at the end of its context; after an error, without writing what is left."""

    def write(self, line: bytes) -> None:
        """See `Sink`."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Sink`."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Close the file as it is. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()
