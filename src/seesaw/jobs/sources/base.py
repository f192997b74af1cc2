"""What a format must tell of an input: `Source`; and which columns a user named: `ColumnNames`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from seesaw.jobs.base import JobOptions
from seesaw.jobs.reader import Record, Unit


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Columns of tables, or fields of plain lines, that a user named."""

    prompt: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: JobOptions) -> ColumnNames:
        """The names given in `options`."""
        return cls(options.prompt_column, options.id_column, options.keep_columns)


class Source(Protocol):
    """One open input. Opening one raises `JobError` if it is not of the format or lacks a column.

    `records` raises `OSError` or `DamagedStream` where it cannot go on, after every record before that.
    """

    @property
    def unit(self) -> Unit: ...

    def describe(self) -> str | None:
        """Which columns are what, in a line; None where the format has no columns."""
        ...

    def records(self) -> Iterator[Record]:
        """What stands in it, once, in order; blank lines are left out."""
        ...

    def share(self) -> float | None:
        """How much has been read, from 0 to 1; None where the size is unknown. From any thread."""
        ...

    def count(self, stop: threading.Event) -> int | None:
        """Records in all, or a little more; None where that is not to be had, or once `stop` is set.

        Leaves `records` alone; may take long, and is called from a thread of its own.
        """
        ...

    def close(self) -> None:
        """May be called twice."""
        ...
