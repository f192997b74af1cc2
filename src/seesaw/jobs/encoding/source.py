"""`EncodedRows`: the rows of a job, made into requests ahead of need by processes of their own."""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from seesaw.core.errors import RequestError
from seesaw.core.request import Request
from seesaw.jobs.base import Row, RowFailure
from seesaw.jobs.encoding.pool import Batch, EncoderPool
from seesaw.jobs.encoding.wire import Reply
from seesaw.jobs.requests import INTERNAL_ERROR, Draft, RequestMaker

logger = logging.getLogger(__name__)

_BATCHES_AT_ONCE = 4
"""Most batches read before a row is given out, lest the first ones wait for thousands."""
_MOST_DEATHS = 2
"""Encoders that a row may cost while it is alone in its batch."""


class EncodedRow(msgspec.Struct, frozen=True, gc=False):
    """A row and its request."""

    row: Row
    request: Request


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that no request can be made of, and why."""

    row: Row
    error: RequestError


Encoded = EncodedRow | RefusedRow | RowFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """How far rows are read ahead of need. One row is always read, however large."""

    rows: int = 4096
    bytes: int = 64 << 20
    """Of prompts. It is passed by one row at most."""
    batch_rows: int = 64
    """Most rows that travel together; the first batches are smaller, so that the first requests come at once."""
    batch_bytes: int = 1 << 18


@dataclass(eq=False, slots=True)
class _Slot:
    """A row between source and consumer."""

    row: Row
    size: int = 0
    """Bytes of its prompt."""
    draft: Draft | None = None
    """Set while an outcome is still to come."""
    item: bytes | None = None
    """What is sent to an encoder; None where that cannot be, and when it has answered."""
    sent: bool = False
    """Whether a batch that the pool holds has it."""
    outcome: Encoded | None = None
    tokens: bytes | None = None
    """Tokens of the whole batch; this row has `count` of them from byte `start`."""
    start: int = 0
    count: int = 0
    suspect: bool = False
    """Whether an encoder ended while it had this row."""
    deaths: int = 0
    """Encoders that ended while they had this row alone."""


class EncodedRows(Iterator[Encoded]):
    """Takes rows from `source` in order and gives each out once, in the same order.

    With a `pool`, rows are read ahead within `ahead` and tokenised by its encoders. Until one is up, and when
    they do not stay up, and without a pool, rows are made here, as they are asked for. What a row becomes is
    the same either way, but for a row that ends the process that tokenises it: it is refused as
    `internal_error`. What `source` raises is raised once the rows before it have been given out. Owns the pool.
    Not thread-safe.
    """

    def __init__(
        self,
        source: Iterable[Row | RowFailure],
        maker: RequestMaker,
        pool: EncoderPool | None = None,
        *,
        ahead: Ahead | None = None,
    ) -> None:
        self._source, self._maker, self._pool = iter(source), maker, pool
        self._ahead = ahead or Ahead()
        self._most_rows = max(1, min(self._ahead.batch_rows, self._ahead.rows // 4))
        self._batch_rows = 1
        """Rows of the next batch."""
        self._packer = msgspec.msgpack.Encoder()
        self._slots: deque[_Slot | RowFailure] = deque()
        self._bytes = 0
        self._end: Exception | None = None
        """What the source ended with."""
        self._due = 0
        """Rows to give out before the next look at the pool."""

    @property
    def rows_ahead(self) -> int:
        """Rows read and not yet given out."""
        return len(self._slots)

    @property
    def bytes_ahead(self) -> int:
        """Bytes of their prompts."""
        return self._bytes

    def __next__(self) -> Encoded:
        if self._pool is not None:
            if self._due <= 0:
                self._look(self._pool)
            self._due -= 1
        if not self._slots and not self._read():
            assert self._end is not None
            raise self._end
        slot = self._slots[0]
        if not isinstance(slot, _Slot):
            self._slots.popleft()
            return slot
        while slot.outcome is None and slot.tokens is None:
            if self._pool is not None and slot.sent:
                self._wait(self._pool)
            else:
                self._make_here(slot)
        self._slots.popleft()
        self._bytes -= slot.size
        return slot.outcome or _finished(slot)

    def close(self) -> None:
        """End the pool. May be called twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- reading ------------------------------------------------------------------------------------------

    def _look(self, pool: EncoderPool) -> None:
        """Take in what encoders have done, and read on as far as bounds allow."""
        self._pump(pool, 0)
        for _ in range(_BATCHES_AT_ONCE):
            if not (pool.ready and self._may_read()):
                break
            self._read_batch(pool)
        self._due = self._batch_rows // 2

    def _may_read(self) -> bool:
        return (
            self._end is None
            and len(self._slots) + self._batch_rows <= self._ahead.rows
            and self._bytes < self._ahead.bytes
        )

    def _read_batch(self, pool: EncoderPool) -> None:
        batch: list[_Slot] = []
        size = 0
        for _ in range(self._batch_rows):
            if not self._read():
                break
            slot = self._slots[-1]
            if isinstance(slot, _Slot) and slot.item is not None:
                batch.append(slot)
                size += slot.size
            if size >= self._ahead.batch_bytes or self._bytes >= self._ahead.bytes:
                break
        self._batch_rows = min(2 * self._batch_rows, self._most_rows)
        if batch:
            self._send(pool, batch)

    def _read(self) -> bool:
        """Read a row into a new last slot, as far as it can be made without an encoder; False at the end."""
        if self._end is not None:
            return False
        try:
            row = next(self._source)
        except Exception as error:
            self._end = error
            return False
        if isinstance(row, RowFailure):
            self._slots.append(row)
            return True
        slot = _Slot(row)
        try:
            slot.draft = self._maker.draft(row)
        except RequestError as error:
            slot.outcome = _refused(row, error)
        else:
            self._measure(slot, slot.draft)
        self._slots.append(slot)
        self._bytes += slot.size
        return True

    def _measure(self, slot: _Slot, draft: Draft) -> None:
        """Find the size of a prompt and, if it needs an encoder, how to send it."""
        if draft.tokens is not None:
            slot.size = 8 * len(draft.tokens)
            slot.outcome = EncodedRow(slot.row, draft.request(draft.tokens))
        elif self._pool is not None:
            try:
                slot.item = self._packer.encode(draft.item)
                slot.size = len(slot.item)
            except (TypeError, ValueError, OverflowError, RecursionError):
                pass  # halves of surrogate pairs, integers of 100 digits: it is made here, and most likely refused

    def _make_here(self, slot: _Slot) -> None:
        assert slot.draft is not None
        if slot.suspect:
            slot.outcome = RefusedRow(slot.row, _deadly("the processes that tokenise do not stay up"))
            return
        try:
            slot.outcome = EncodedRow(slot.row, slot.draft.request(self._maker.encode(slot.draft)))
        except RequestError as error:
            slot.outcome = _refused(slot.row, error)

    # ---- encoders -----------------------------------------------------------------------------------------

    def _send(self, pool: EncoderPool, slots: list[_Slot]) -> None:
        for slot in slots:
            slot.sent = True
        pool.submit(Batch([slot.item for slot in slots if slot.item is not None], slots))

    def _wait(self, pool: EncoderPool) -> None:
        """Wait for encoders, and read on meanwhile."""
        if pool.ready and self._may_read():
            self._read_batch(pool)
            self._pump(pool, 0)
        else:
            self._pump(pool, None)

    def _pump(self, pool: EncoderPool, timeout: float | None) -> None:
        done, lost = pool.pump(timeout)
        for batch in done:
            assert batch.reply is not None
            _share_out(batch.of, batch.reply)
        for batch in lost:
            self._redo(pool, batch.of)
        if pool.broken:
            logger.warning("the processes that tokenise do not stay up; this process does their work")
            self.close()

    def _redo(self, pool: EncoderPool, slots: list[_Slot]) -> None:
        """Rows whose encoder ended are tried again one by one, so that only the one that ends it is refused."""
        for slot in slots:
            slot.sent = False
            if pool.broken:
                continue
            slot.suspect = True
            slot.deaths += len(slots) == 1
            if slot.deaths < _MOST_DEATHS:
                self._send(pool, [slot])
            else:
                slot.outcome = RefusedRow(
                    slot.row, _deadly("the process that tokenises ended on it each time")
                )


def _share_out(slots: list[_Slot], reply: Reply) -> None:
    """Give each row of a batch its part of the reply."""
    refusals = iter(reply.refusals)
    start = 0
    for slot, count in zip(slots, reply.counts, strict=True):
        slot.item = None
        if count < 0:
            slot.outcome = RefusedRow(slot.row, next(refusals).error())
        else:
            slot.tokens, slot.start, slot.count = reply.tokens, start, count
            start += 4 * count


def _finished(slot: _Slot) -> EncodedRow:
    assert slot.draft is not None
    assert slot.tokens is not None
    tokens = struct.unpack_from(f"={slot.count}i", slot.tokens, slot.start)
    return EncodedRow(slot.row, slot.draft.request(tokens))


def _refused(row: Row, error: RequestError) -> RefusedRow:
    """Without its traceback, whose frames hold what holds the error: rows are to go without the garbage collector."""
    return RefusedRow(row, error.with_traceback(None))


def _deadly(reason: str) -> RequestError:
    return RequestError(f"the prompt could not be tokenised: {reason}", code=INTERNAL_ERROR, param="prompt")
