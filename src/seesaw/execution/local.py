"""`LocalExecutor`: worker processes on this node, one per rank."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import zmq

from seesaw.core.actions import (
    Action,
    Completion,
    CopiesDone,
    Forward,
    ForwardDone,
    SwapIn,
    SwapOut,
    TransitionDone,
)
from seesaw.core.errors import EngineError, StartupError, WorkerError
from seesaw.core.events import Event
from seesaw.execution.fork_server import fork_server
from seesaw.execution.liveness import BEAT, Liveness
from seesaw.execution.messages import (
    Alive,
    CopiesAck,
    Events,
    Failed,
    FromWorker,
    Ready,
    Shutdown,
    ToWorker,
    TransitionAck,
    WorkerConfig,
)
from seesaw.weights.sharding import Sharding

logger = logging.getLogger(__name__)

OnEvents = Callable[[list[Event]], None]
_CAUSE_SECONDS = 2.0
"""How long after a rank's failure is waited for the death of another, which may be its cause."""
_MORE_SECONDS = 0.2
"""The same once a cause is known: what ended one rank may have ended others."""
_LOOK_SECONDS = 0.02


@dataclass(slots=True)
class _Pending:
    """Acknowledgements still to come for an action, and what has been reported of it."""

    left: int
    bytes: int = 0
    copied: int = 0
    seconds: float = 0.0
    started: float = float("inf")
    ended: float = 0.0


@dataclass(slots=True)
class _Rank:
    """The control process's end of one worker."""

    pid: int
    pidfd: int
    inbox: zmq.Socket[bytes]
    ready: Ready | None = None


class LocalExecutor:
    """Starts the workers, hands actions out and gathers acknowledgements.

    Owns the worker processes and the sockets; the host memory that the workers share is its caller's.
    Nothing of all this has a name in the file system but a directory in which the ranks meet, removed when
    they are up; the kernel frees the rest with the processes.
    """

    def __init__(
        self, configs: list[WorkerConfig], shardings: list[Sharding], on_events: OnEvents | None = None
    ) -> None:
        """`on_events` takes what ranks tell of their doings; it is called while the executor waits or closes."""
        self._configs, self._shardings, self._on_events = configs, shardings, on_events
        self._current = 0
        self._pending: dict[int, _Pending] = {}
        self._forwards_out = 0
        self._ranks: list[_Rank] = []
        self._liveness: Liveness | None = None
        """None until all ranks are up."""
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = self._context.socket(zmq.PULL)
        self._poller = zmq.Poller()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        meeting = tempfile.mkdtemp(prefix="seesaw-")
        try:
            self._start(meeting)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(meeting, ignore_errors=True)

    # ---- start and end ------------------------------------------------------------------------------------

    def _start(self, rendezvous: str) -> None:
        name = uuid.uuid4().hex
        outbox = f"ipc://@seesaw-{name}"  # abstract: it vanishes with the last process that has it open
        self._outbox.bind(outbox)
        self._poller.register(self._outbox, zmq.POLLIN)
        server = fork_server()
        for config in self._configs:
            inbox = self._context.socket(zmq.PUSH)
            inbox.setsockopt(zmq.SNDHWM, 0)
            address = f"{outbox}-{config.rank}"
            inbox.bind(address)
            config = msgspec.structs.replace(config, inbox=address, outbox=outbox, rendezvous=rendezvous)
            pid = server.fork(config)
            self._ranks.append(_Rank(pid, os.pidfd_open(pid), inbox))
            self._poller.register(self._ranks[-1].pidfd, zmq.POLLIN)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        timeout = self._configs[0].start_timeout
        deadline = time.monotonic() + timeout
        while any(rank.ready is None for rank in self._ranks):
            left = deadline - time.monotonic()
            if left <= 0:
                late = [r for r, rank in enumerate(self._ranks) if rank.ready is None]
                raise StartupError(f"ranks {late} were not ready after {timeout:.0f} s")
            for message in self._receive(left):
                assert isinstance(message, Ready)
                self._ranks[message.rank].ready = message
        self._liveness = Liveness(len(self._ranks), self._configs[0].rank_timeout, time.monotonic())

    def close(self) -> None:
        """End all workers: politely when nothing is outstanding, by SIGKILL otherwise."""
        if self._closed:
            return
        self._closed = True
        if (
            not self._pending
            and not self._forwards_out
            and all(rank.ready is not None for rank in self._ranks)
        ):
            self._send(range(len(self._ranks)), Shutdown())
            self._await_exit(5.0)
            self._hear_out()
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        self._await_exit(5.0)
        for rank in self._ranks:
            os.close(rank.pidfd)
            rank.inbox.close(linger=0)
        self._outbox.close(linger=0)
        self._context.term()

    def _await_exit(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for rank in self._ranks:
            left = max(0.0, deadline - time.monotonic())
            poller = zmq.Poller()
            poller.register(rank.pidfd, zmq.POLLIN)
            poller.poll(int(left * 1000))

    # ---- actions and completions --------------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        """Send an action to the ranks it concerns."""
        match action:
            case Forward():
                ranks = self._members(action.replica)
                if action.write_through:
                    self._pending[action.id] = _Pending(len(ranks))
                self._forwards_out += 1
            case SwapOut() | SwapIn():
                ranks = self._members(action.replica)
                self._pending[action.id] = _Pending(len(ranks))
            case _:
                ranks = list(range(len(self._ranks)))
                self._current = action.target
                self._pending[action.id] = _Pending(len(self._ranks))
        self._send(ranks, action)

    def wait(self) -> list[Completion]:
        """Completions since the last call; blocks until there is one. Raises `WorkerError` if a rank failed."""
        completions: list[Completion] = []
        while not completions:
            for message in self._receive(BEAT):
                completion = self._completion(message)
                if completion is not None:
                    completions.append(completion)
        return completions

    def _members(self, replica: int) -> list[int]:
        sharding = self._shardings[self._current]
        size = sharding.layout.replica_ranks
        return list(sharding.ranks[replica * size : (replica + 1) * size])

    def _send(self, ranks: Iterable[int], message: ToWorker) -> None:
        data = self._encoder.encode(message)
        for rank in ranks:
            # What waits to be sent has no limit: only a rank that has ended takes nothing, which `wait` will tell.
            with contextlib.suppress(zmq.Again):
                self._ranks[rank].inbox.send(data, zmq.NOBLOCK)

    def _receive(self, seconds: float) -> list[FromWorker]:
        """Messages that have arrived, but for signs of life; waits up to `seconds` for the first."""
        if self._closed:
            raise EngineError("the ranks have been ended")
        events = dict(self._poller.poll(int(seconds * 1000) + 1))
        messages = self._drain() if self._outbox in events else []
        failed = [message for message in messages if isinstance(message, Failed)]
        if failed:
            self._raise(failed)
        signs = [message for message in messages if isinstance(message, Alive)]
        if signs:
            messages = [message for message in messages if not isinstance(message, Alive)]
        if not messages and (dead := self._dead(events)):
            # a rank's last words may have come after its messages were looked for
            self._raise([message for message in self._drain() if isinstance(message, Failed)], dead)
        if self._liveness is not None:
            for sign in signs:
                self._liveness.heard(sign.rank, sign.phase)
            self._liveness.looked(time.monotonic())
        return messages

    def _drain(self) -> list[FromWorker]:
        messages: list[FromWorker] = []
        with contextlib.suppress(zmq.Again):
            while True:
                message = self._decoder.decode(self._outbox.recv(zmq.NOBLOCK))
                if not isinstance(message, Events):
                    messages.append(message)
                elif self._on_events is not None:
                    self._on_events(message.events)
        return messages

    def _hear_out(self) -> None:
        """Take in the last events of ranks that have ended."""
        while self._on_events is not None and self._outbox.poll(20):
            self._drain()

    def _dead(self, events: dict[object, int]) -> set[int]:
        """Ranks that have ended, by what the poller says."""
        return {number for number, rank in enumerate(self._ranks) if rank.pidfd in events}

    def _raise(self, failed: list[Failed], dead: Collection[int] = ()) -> NoReturn:
        """Say what became of ranks that failed or ended.

        A rank that was killed tears its neighbours' connections, and they may be heard of first: it is the cause,
        what they say is not. So the deaths of those who said nothing are waited for, for a while.
        """
        ended, deadline = set(dead), time.monotonic() + _CAUSE_SECONDS
        while True:
            silent = sorted(ended - {message.rank for message in failed})
            device = tuple(message.rank for message in failed if message.device)
            if silent or device:
                deadline = min(deadline, time.monotonic() + _MORE_SECONDS)
            if time.monotonic() > deadline - _LOOK_SECONDS:
                break
            time.sleep(_LOOK_SECONDS)
            ended |= self._dead(dict(self._poller.poll(0)))
            failed = failed + [message for message in self._drain() if isinstance(message, Failed)]
        if silent:
            raise self._died(silent, device)
        message = next((message for message in failed if message.device), failed[0])
        raise WorkerError(
            f"rank {message.rank} failed during {message.phase}: {message.message}",
            rank=message.rank,
            phase=message.phase,
            details=message.details,
            lost=device,
        )

    def _died(self, silent: list[int], device: tuple[int, ...]) -> WorkerError:
        """The error for ranks that ended without a word, beside those whose device failed."""
        phase = "startup" if self._ranks[silent[0]].ready is None else "run"
        who = ", ".join(f"rank {rank} (process {self._ranks[rank].pid})" for rank in silent)
        return WorkerError(
            f"{who} ended without a word during {phase}; killed, or out of memory",
            rank=silent[0],
            phase=phase,
            lost=(*silent, *device),
        )

    def _completion(self, message: FromWorker) -> Completion | None:
        match message:
            case ForwardDone():
                self._forwards_out -= 1
                return message
            case CopiesAck():
                pending = self._pending[message.id]
                pending.bytes += message.bytes
                pending.seconds = max(pending.seconds, message.seconds)
                if self._acknowledge(message.id, pending):
                    return CopiesDone(message.id, pending.bytes, pending.seconds)
            case TransitionAck():
                pending = self._pending[message.id]
                pending.bytes += message.bytes
                pending.copied += message.copied
                pending.seconds = max(pending.seconds, message.moving)
                pending.started = min(pending.started, message.started)
                pending.ended = max(pending.ended, message.ended)
                if self._acknowledge(message.id, pending):
                    elapsed = pending.ended - pending.started
                    return TransitionDone(
                        message.id, pending.bytes, elapsed, copied=pending.copied, moving=pending.seconds
                    )
            case _:
                raise EngineError(f"unexpected message from a worker: {message}")
        return None

    def _acknowledge(self, action: int, pending: _Pending) -> bool:
        pending.left -= 1
        if pending.left == 0:
            del self._pending[action]
            return True
        return False
