"""The queue before the writer's thread: bounded, from several threads, and never in the way of an end."""

from __future__ import annotations

import threading

import pytest

from seesaw.core.errors import JobError
from seesaw.jobs import writer
from seesaw.jobs.base import RowFailure
from seesaw.jobs.journal import Kind
from seesaw.jobs.writer import JobWriter

ROWS = 300


class SlowStore:
    """A store that takes a row only when it is let, and may fail at one."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.gate = threading.Semaphore(0)
        self.rows: list[int] = []
        self.fail_at = fail_at
        self.waiting = self.safe = 0

    def add(self, kind: Kind, number: int, digest: int, line: bytes) -> None:
        self.gate.acquire()
        if len(self.rows) == self.fail_at:
            raise JobError("the disk is full")
        self.rows.append(number)

    def sync(self) -> None:
        self.safe = len(self.rows)

    def close(self) -> None:
        pass


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(writer, "_QUEUED", 8)
    return 8


def failure(number: int) -> RowFailure:
    return RowFailure(number=number, digest=0, id=f"r{number}", code="c", message="m")


def producer(out: JobWriter, numbers: range, errors: list[Exception]) -> threading.Thread:
    def work() -> None:
        try:
            for number in numbers:
                out.fail(failure(number))
        except JobError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_rows_wait_for_room_and_each_is_written_once(bound: int) -> None:
    store = SlowStore()
    out = JobWriter(store, model="m")
    threads = [producer(out, range(i, ROWS, 2), []) for i in range(2)]
    for _ in range(ROWS):
        # Queued, in the writer's hand, and one in the hand of each producer.
        assert out._queue.qsize() <= bound + 2
        store.gate.release()
    for thread in threads:
        thread.join(timeout=20)
    out.close()
    assert sorted(store.rows) == list(range(ROWS))
    assert [n for n in store.rows if n % 2] == list(range(1, ROWS, 2))
    assert out.safe == out.failures["c"] == ROWS


def test_who_waits_for_room_goes_on_when_the_writer_fails(bound: int) -> None:
    store = SlowStore(fail_at=3)
    out = JobWriter(store, model="m")
    errors: list[Exception] = []
    thread = producer(out, range(ROWS), errors)
    for _ in range(4):
        store.gate.release()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["the disk is full"]
    with pytest.raises(JobError, match="the disk is full"):
        out.close()
    assert store.rows == [0, 1, 2]
