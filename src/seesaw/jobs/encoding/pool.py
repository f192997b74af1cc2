"""`EncoderPool`: the encoder processes of a job and the batches that they hold.

It is driven by whoever calls `pump`; it has no thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from seesaw.jobs.base import Encoder
from seesaw.jobs.encoding.wire import Reply, Setup, framed, take_frames
from seesaw.text import Tokenizer

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Servers started in vain, or encoders that died with nothing to do, before the pool gives itself up."""
_MOST_PROCESSES = 8
_CLOSE_SECONDS = 5.0
_DYING_SECONDS = 0.1
"""An encoder that dies of its server's death may be seen to be gone a little earlier than the server."""
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # lest it report that there is no torch
}


@dataclass(eq=False, slots=True)
class Batch:
    """Items that travel together; `of` is what the owner knows them by, one for each."""

    items: list[bytes]
    """Each in msgpack."""
    of: list[Any]
    reply: Reply | None = None
    """Set by the pool."""

    @property
    def size(self) -> int:
        """Bytes of the items."""
        return sum(map(len, self.items))


def encoder_pool(encoder: Encoder | None, processes: int) -> EncoderPool | None:
    """A pool that encodes as `encoder` does, not yet started; None for 0 processes.

    Only a tokeniser that was loaded by name can be loaded in other processes; any other gives None.
    """
    if processes < 1 or not isinstance(encoder, Tokenizer) or encoder.name is None:
        return None
    return EncoderPool(Setup("seesaw.text:Tokenizer.load", encoder.name), processes)


def spare_processes(busy_cores: int) -> int:
    """How many encoders suit this machine: the cores that ranks and this process leave, from 1 to 8."""
    return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - busy_cores - 1))


class _Server:
    """The process that forks encoders, and the socket to it."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        # Encoders find modules where this process does, and not in its working directory besides.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, **_QUIET, "PYTHONPATH": path}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "seesaw.jobs.encoding.server"],
                stdin=theirs.fileno(),
                env=environment,
                process_group=0,
            )
        self._socket = ours
        with contextlib.suppress(OSError):  # it died at once; its encoders' sockets will say so
            ours.sendall(framed(msgspec.msgpack.encode(setup)))

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self, within: float) -> bool:
        """Whether the process ends within so many seconds."""
        try:
            self._process.wait(timeout=within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def fork(self) -> socket.socket:
        """The socket of a new encoder, which is closed at once if there can be none."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
        ours.setblocking(False)
        return ours

    def close(self) -> None:
        self._socket.close()
        if not self.ended(within=_CLOSE_SECONDS):  # it is loading still
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass(eq=False, slots=True)
class _Worker:
    """This end of an encoder."""

    socket: socket.socket
    ready: bool = False
    held: deque[Batch] = field(default_factory=deque)
    """Batches sent and not answered, in order."""
    load: int = 0
    """Bytes of the items of `held`."""
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)


class EncoderPool:
    """Encoder processes that answer batches; each takes its own in order.

    A batch whose encoder died is handed back by `pump` as lost if it was the one being worked on; the encoder's
    other batches go to another one. Not thread-safe.
    """

    def __init__(self, setup: Setup, processes: int) -> None:
        assert processes > 0
        self._setup, self._processes = setup, processes
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._server: _Server | None = None
        self._vain = 0
        """Deaths in a row that no batch explains."""
        self.broken = False
        """Whether encoders do not stay up. The pool takes nothing more then."""

    def start(self) -> None:
        """Start the processes; returns at once. They load the tokeniser meanwhile."""
        self._server = _Server(self._setup)
        for _ in range(self._processes):
            self._add()

    @property
    def ready(self) -> bool:
        """Whether an encoder is up."""
        return any(worker.ready for worker in self._workers)

    @property
    def pid(self) -> int | None:
        """The process that forks encoders, of which it is the parent; None before `start` and after `close`."""
        return None if self._server is None else self._server.pid

    def submit(self, batch: Batch) -> None:
        """Give a batch to the encoder that has the least to do."""
        worker = min(self._workers, key=lambda w: (not w.ready, w.load))
        worker.held.append(batch)
        worker.load += batch.size
        worker.outgoing += framed(msgspec.msgpack.encode([msgspec.Raw(item) for item in batch.items]))
        self._send(worker)

    def pump(self, timeout: float | None) -> tuple[list[Batch], list[Batch]]:
        """Move bytes both ways, waiting up to `timeout` seconds for any (None: as long as it takes).

        Returns batches answered and batches lost. Once the pool is broken, all that it held are lost.
        """
        done: list[Batch] = []
        lost: list[Batch] = []
        for key, events in self._selector.select(timeout):
            worker: _Worker = key.data
            if events & selectors.EVENT_WRITE:
                self._send(worker)
            if events & selectors.EVENT_READ and not self._receive(worker, done):
                lost += self._bury(worker)
            if self.broken:
                break  # the other sockets are closed
        return done, lost

    def close(self) -> None:
        """End the processes. May be called twice."""
        for worker in self._workers:
            worker.socket.close()
        self._workers.clear()
        self._selector.close()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _add(self) -> _Worker:
        assert self._server is not None
        worker = _Worker(self._server.fork())
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _send(self, worker: _Worker) -> None:
        with contextlib.suppress(OSError):  # would block; or the encoder is gone, which reading tells
            while worker.outgoing:
                del worker.outgoing[: worker.socket.send(memoryview(worker.outgoing)[: 1 << 18])]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self._selector.modify(worker.socket, events, worker)

    def _receive(self, worker: _Worker, done: list[Batch]) -> bool:
        """Take in what has arrived; False if the encoder is gone."""
        alive = True
        try:
            while part := worker.socket.recv(1 << 18):
                worker.incoming += part
            alive = False
        except BlockingIOError:
            pass
        except OSError:
            alive = False
        for frame in take_frames(worker.incoming):
            if frame:
                batch = worker.held.popleft()
                worker.load -= batch.size
                batch.reply = msgspec.msgpack.decode(frame, type=Reply)
                done.append(batch)
            worker.ready = True
            self._vain = 0
        return alive

    def _bury(self, worker: _Worker) -> list[Batch]:
        """Replace an encoder that is gone; returns the batches that are lost with it."""
        self._selector.unregister(worker.socket)
        worker.socket.close()
        self._workers.remove(worker)
        assert self._server is not None
        if not (worker.ready and worker.held):
            self._vain += 1
        if self._vain >= _ATTEMPTS * self._processes:
            return self._break(worker)
        if self._server.ended(within=_DYING_SECONDS):
            self._server.close()
            self._server = _Server(self._setup)
        self._add()
        suspects = [worker.held.popleft()] if worker.ready and worker.held else []
        for batch in worker.held:
            self.submit(batch)
        return suspects

    def _break(self, worker: _Worker) -> list[Batch]:
        self.broken = True
        lost = [batch for each in (worker, *self._workers) for batch in each.held]
        self.close()
        return lost
