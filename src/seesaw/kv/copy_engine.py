"""A thread that copies beside computation."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class CopyEngine:
    """Runs copies one after another, in the order submitted, on a thread of its own.

    A copy that fails stops the engine: later copies are dropped without `on_done`, and its exception is
    raised by every later `submit` and `drain` and, if nobody has seen it yet, by `close`. A process that
    exits without `close` finishes the copies that are queued and leaves. Make the engine after forking:
    threads stay behind.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seesaw-copies")
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._last: Future[None] | None = None
        self._error: BaseException | None = None
        self._seen = False
        self._closed = False

    def submit(self, copy: Callable[[], int], on_done: Callable[[int, float], None] | None = None) -> None:
        """Queue `copy`, which returns the bytes it copied.

        Then `on_done(bytes, seconds)` is called on the engine's thread; an exception from it counts as the
        copy's.
        """
        assert os.getpid() == self._pid, "a copy engine does not survive a fork"
        self._raise()
        with self._lock:
            assert not self._closed, "the copy engine is closed"
            self._last = self._pool.submit(self._run, copy, on_done)

    def drain(self) -> None:
        """Wait until everything submitted so far is done."""
        with self._lock:
            last = self._last
        if last is not None:
            last.result()
        self._raise()

    def close(self) -> None:
        """Finish what is queued and end the thread. May be called twice."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True)
        if not self._seen:
            self._raise()

    def _run(self, copy: Callable[[], int], on_done: Callable[[int, float], None] | None) -> None:
        if self._error is not None:
            return
        try:
            start = time.perf_counter()
            copied = copy()
            if on_done is not None:
                on_done(copied, time.perf_counter() - start)
        except BaseException as error:  # whatever it is, the submitting thread must learn of it
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            self._seen = True
            raise self._error
