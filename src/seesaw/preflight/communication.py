"""Whether the ranks of a plan can talk: every operation of its layouts really runs, with checked data, beforehand.

A transport may say that it works and then hang, crash or corrupt what it carries. So ranks at the plan's places try
it in processes of their own, under a time limit; where it fails, the next one is tried.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError
from seesaw.core.node import Place
from seesaw.preflight.findings import Finding, settle
from seesaw.preflight.messages import MEET, PLACE, Check, Problem, Ready, Step, Verdict
from seesaw.preflight.program import describe, timed_steps

if TYPE_CHECKING:
    from seesaw.transport.select import Kind

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

LIMIT_SECONDS = 20.0
"""What one transport may take; the whole check takes a fraction of a second where all is well."""
LOADING_SECONDS = 300.0
"""What the leader may take to load torch, and to compile the native library if that is not done."""
GRACE_SECONDS = 3.0
"""Beyond its own time limit, until the leader itself counts as hanging."""
LOOPBACK = "127.0.0.1"
_ORDER: tuple[Kind, ...] = ("nccl", "nccl-no-p2p", "shm", "tcp", "gloo")
"""What is tried after what."""
DEVICE_LIMIT_SECONDS = 90.0
"""What ranks on devices may take: each opens its device first, and a library that connects them asks every link."""
SLOW_LINK = 2.5e9
"""Bytes a second below which a link between devices is named. PCIe 3.0 of 16 lanes has 12e9, of 4 lanes 3e9, and host
memory on the way halves them at worst."""
_NO_P2P = "NCCL_P2P_DISABLE"
_HINTS = {
    "nccl": "often GPUs do not reach each other's memory although the driver says that they do: switch the IOMMU off "
    "or boot with iommu=pt, and switch ACS off on PCIe bridges; NCCL_P2P_DISABLE=1 keeps NCCL without it, slower",
    "nccl-no-p2p": "this is NCCL with NCCL_P2P_DISABLE=1, so it is not access to memory of other GPUs that fails; "
    "NCCL_DEBUG=INFO says what it does, and a container needs --shm-size=1g or --ipc=host",
}
_NAMED = 4
"""Slow links that a warning lists."""
_LARGEST_ANSWER = 1 << 20


@dataclass(frozen=True, slots=True)
class Connection:
    """What was found to work."""

    transport: Kind
    places: tuple[Place, ...]
    """Where ranks run; for sockets on one network, with the loopback address."""
    failures: tuple[str, ...] = ()
    """A sentence for each transport that failed before."""


class LeaderLostError(Exception):
    """The leader is of no more use; the message says what it did, as in `did not answer within 23 s`."""


class Leader:
    """The control process's end of a leader process (`seesaw.preflight.leader`); starts it, and owns it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._pending = b""
        self._ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "seesaw.preflight.leader"],
                stdin=theirs.fileno(),
                start_new_session=True,  # a group to kill, and Ctrl-C is for the control process alone
            )

    def attempt(self, check: Check) -> Verdict:
        """Carry out `check`. Raises `LeaderLostError` if the leader ends or does not answer in time."""
        if not self._ready:
            self._answer(Ready, LOADING_SECONDS)
            self._ready = True
        try:
            self._socket.sendall(msgspec.json.encode(check) + b"\n")
        except OSError:
            raise LeaderLostError("ended") from None
        return self._answer(Verdict, check.limit + GRACE_SECONDS)

    def _answer(self, kind: type[_T], seconds: float) -> _T:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise LeaderLostError(f"did not answer within {seconds:g} s")
            with suppress(ConnectionError):
                data = self._socket.recv(_LARGEST_ANSWER)
                self._pending += data
                if data:
                    continue
            raise LeaderLostError("ended")
        line, _, self._pending = self._pending.partition(b"\n")
        return msgspec.json.decode(line, type=kind)

    @property
    def pid(self) -> int:
        """Of the leader, and of its process group."""
        return self._process.pid

    def close(self) -> None:
        """Kill the leader and all ranks it has. May be called twice."""
        self._socket.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


_early: list[Leader] = []
_early_lock = threading.Lock()


def start_early() -> None:
    """Start the leader of the next check now, so that it loads torch while the caller does other things."""
    with _early_lock:
        if not _early:
            _early.append(Leader())
            atexit.register(discard_early)


def discard_early() -> None:
    """End a leader that was started early and not used."""
    with _early_lock:
        while _early:
            _early.pop().close()


def _take_early() -> Leader | None:
    with _early_lock:
        return _early.pop() if _early else None


def find_connection(
    steps: Sequence[Step],
    places: Sequence[Place],
    *,
    transport: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    own: Kind | None = None,
    limit: float | None = None,
    wrapper: str = "",
) -> Connection:
    """The first transport over which `steps` run without fault, by ranks at `places`.

    One that was asked for by name is the only one tried. `device` is the kind that ranks compute on, `own` what
    connects such devices without the host: its groups and links are timed as well, and a warning names slow ones.
    `limit` is in seconds, for each. Raises `ConfigError` with
    what failed if none works, or if the ranks cannot get to their places.
    """
    failures: list[str] = []
    addresses = all(place.address for place in places)
    kinds = _candidates(transport, len(places), addresses=addresses, own=own)
    limit = limit or (LIMIT_SECONDS if device_kind(device).on_host else DEVICE_LIMIT_SECONDS)
    with Attempts() as attempts:
        for kind in kinds:
            if failures:
                logger.warning("preflight: %s; going on with '%s'", failures[-1], kind)
            there = _with_addresses(places) if kind == "tcp" else tuple(places)
            timing = timed_steps(steps) if own is not None and kind.startswith(own) else []
            with meeting(kind) as rendezvous:
                check = Check(
                    transport=kind,
                    places=list(there),
                    dtype=dtype,
                    device=device,
                    steps=[*steps, *timing],
                    limit=limit,
                    rendezvous=rendezvous,
                    wrapper=wrapper,
                )
                verdict = attempts.run(check)
            if verdict.problem is None:
                works = "preflight: %d ranks exchange data correctly over '%s' (%.1f s)"
                logger.info(works, len(places), kind, verdict.seconds)
                settle(slow_links(check.steps, verdict.rates))
                return Connection(kind, there, tuple(failures))
            if verdict.problem.step == PLACE and verdict.problem.kind == "raised":
                said = verdict.problem.message.partition(": ")[2]
                raise ConfigError(f"preflight: rank {verdict.problem.ranks[0]} {said}")
            hint = f"; {_HINTS[kind]}" if kind in _HINTS else ""
            failures.append(f"transport '{kind}' failed: {explain(verdict.problem, check)}{hint}")
    raise ConfigError(
        f"preflight: no transport connects the {len(places)} ranks: {'; '.join(failures)}; {_remedy(transport)}"
    )


def slow_links(steps: Sequence[Step], rates: Mapping[int, float]) -> list[Finding]:
    """What is much slower than PCIe, of the steps that were timed."""
    slow = {number: rate for number, rate in rates.items() if rate < SLOW_LINK}
    if not slow:
        return []
    named = [
        f"{'ranks ' + ', '.join(map(str, members)) if what == 'all_reduce' else f'rank {members[0]} to {members[1]}'}"
        f" at {rate / 1e9:.1f} GB/s"
        for number, rate in sorted(slow.items(), key=lambda item: item[1])
        for what, members in [(steps[number].operation, steps[number].members)]
    ]
    more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return [
        Finding(
            "warning",
            f"GPUs exchange data much slower than over PCIe of 16 lanes: {'; '.join(named[:_NAMED])}{more}",
            "nvidia-smi topo -m shows what lies between them, and nvidia-smi -q the lanes of each under load "
            "(Link Width); `seesaw profile --device cuda` lets the planner choose layouts that send less",
        )
    ]


def _remedy(transport: str) -> str:
    if transport != "auto":
        return "transport 'auto' tries others"
    return "one rank (--ranks 1) needs none, and --preflight off goes ahead regardless"


def _candidates(transport: str, world: int, *, addresses: bool, own: Kind | None = None) -> list[Kind]:
    """The transports to try, in order. Raises `ConfigError` for one that cannot be had."""
    from seesaw.transport.select import resolve_kind  # brings torch

    first = resolve_kind(transport, world=world, addresses=addresses, own=own)
    if transport != "auto" or first == "single":
        return [first]
    useless = set()
    if os.environ.get(_NO_P2P, "0") != "0":
        useless.add("nccl-no-p2p")  # the first one is no other
    if first == own and addresses:
        useless.add("shm")  # ranks in networks of their own
    return [kind for kind in _ORDER[_ORDER.index(first) :] if kind not in useless]


def _with_addresses(places: Sequence[Place]) -> tuple[Place, ...]:
    return tuple(
        place if place.address else msgspec.structs.replace(place, address=LOOPBACK) for place in places
    )


@contextmanager
def meeting(kind: Kind) -> Iterator[str]:
    """A directory in which ranks meet, where they need one."""
    if kind in ("shm", "single"):
        yield ""
        return
    directory = tempfile.mkdtemp(prefix="seesaw-")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Attempts:
    """Carries attempts out, by the leader that was started early if there is one, and by a new one after a loss."""

    def __init__(self) -> None:
        self._leader: Leader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._leader is not None:
            self._leader.close()

    def run(self, check: Check) -> Verdict:
        """How `check` ended, whatever became of the leader."""
        if self._leader is None:
            self._leader = _take_early() or Leader()
        started = time.monotonic()
        try:
            return self._leader.attempt(check)
        except LeaderLostError as error:
            self._leader.close()
            self._leader = None
            lost = Problem(kind="raised", step=MEET, ranks=(), message=f"the checking process {error}")
            return Verdict(problem=lost, seconds=time.monotonic() - started)


def explain(problem: Problem, check: Check) -> str:
    """What went wrong, in words: operation, ranks, and how."""
    where = describe(check.steps, problem.step)
    who = ", ".join(map(str, problem.ranks))
    match problem.kind:
        case "wrong":
            return f"{where} {problem.message} (seen by rank {who})"
        case "died":
            return f"rank {who} {problem.message} during {where}"
        case "hung":
            plural = "s" if len(problem.ranks) > 1 else ""
            return f"{where} did not end within {check.limit:g} s (rank{plural} {who} stood there)"
        case _:
            return f"rank {who} raised {problem.message} during {where}" if who else problem.message
