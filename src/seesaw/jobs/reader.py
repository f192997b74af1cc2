"""`RowMaker`: what formats read, made into the rows of a job: their ids, numbers and places.

A source of a format yields `Record`s; here each becomes exactly one `Row` or `RowFailure`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from seesaw.jobs.base import Endpoint, Row, RowFailure
from seesaw.jobs.id_index import IdIndex

Unit = Literal["line", "row"]
"""What an input is counted in: lines of a file, or rows of a table."""
_SHOWN = 40


class RecordError(Exception):
    """A record that is no request. `row_id` is its own id, if one could be read."""

    def __init__(self, code: str, message: str, param: str | None = None, *, where: str = "") -> None:
        super().__init__(message)
        self.code, self.param = code, param
        self.row_id: str | None = None
        self.where = where
        """Said behind the place of the row, such as ` (line 7)`."""


class Parsed(msgspec.Struct, frozen=True, gc=False):
    """A record that has the outer shape of a request."""

    row_id: str | None
    endpoint: Endpoint
    body: dict[str, Any]
    plain: bool = True
    extra: dict[str, Any] = {}


class Record(msgspec.Struct, frozen=True):
    """One line or row of an input, as its format understands it."""

    number: int
    """1-based line or row in its input."""
    digest: int
    content: Parsed | RecordError


class RowMaker:
    """Makes the rows of one job; remembers which ids it has seen, over all inputs.

    `labels` name the inputs in ids and messages; a single input goes without.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._labels = labels
        self._units: list[Unit] = []
        self._before: list[int] = []
        """Lines or rows of the inputs that come before each input, all added up."""
        self._seen = IdIndex()
        self._rows = 0
        self.last = 0
        """Line or row of the present input that was read last; 0 before its first."""

    def rows(self, unit: Unit, records: Iterable[Record]) -> Iterator[Row | RowFailure]:
        """The rows of the next input, one for each record."""
        index = len(self._units)
        self._units.append(unit)
        label = self._labels[index] if self._labels else ""
        prefix, id_prefix = (f"{label}: ", f"{label}:") if label else ("", "")
        before = self._before[-1] + self.last if index else 0
        self._before.append(before)
        self.last = 0
        seen = self._seen.add
        for record in records:
            self._rows += 1
            self.last = number = record.number
            digest, content = record.digest, record.content
            place = f"{prefix}{unit} {number}"
            error = content if isinstance(content, RecordError) else None
            row_id = content.row_id or f"{id_prefix}{unit}-{number}"
            if error is None or error.row_id is not None:
                earlier = seen(row_id, before + number)
                if earlier is not None:
                    error = self._duplicate(row_id, earlier, index)
            if error is None:
                assert isinstance(content, Parsed)
                yield Row(
                    number=self._rows,
                    place=place,
                    digest=digest,
                    id=row_id,
                    endpoint=content.endpoint,
                    body=content.body,
                    plain=content.plain,
                    extra=content.extra,
                )
            else:
                yield RowFailure(
                    number=self._rows,
                    digest=digest,
                    id=row_id,
                    code=error.code,
                    message=f"{place}{error.where}: {error}",
                    param=error.param,
                    extra=content.extra if isinstance(content, Parsed) else {},
                )

    def _duplicate(self, row_id: str, position: int, index: int) -> RecordError:
        first = bisect_left(self._before, position) - 1
        unit, number = self._units[first], position - self._before[first]
        there = f"{'on line' if unit == 'line' else 'in row'} {number}"
        if first != index:
            there += f" of {self._labels[first]}"
        message = f"the id {shown(row_id)} was used {there} already; ids must be unique"
        return RecordError("duplicate_custom_id", message, "custom_id")


def text_id(name: str, value: object) -> str:
    """An id from the field or column `name`. Raises `RecordError`."""
    if not isinstance(value, str) or not value:
        found = "an empty string" if value == "" else kind(value)
        raise RecordError(
            "invalid_custom_id", f"{name}: expected a string that is not empty, found {found}", name
        )
    return value


def kind(value: object) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: object) -> str:
    """`value` as it goes into a message: never long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
