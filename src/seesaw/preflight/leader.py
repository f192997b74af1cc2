"""The process that carries attempts out: `python -m seesaw.preflight.leader`, with a socket as its standard input.

It has imported torch and forks the ranks of each attempt from itself, watches them, kills them when one fails or
time is up, and answers. It leads a process group of its own, so that the control process can end all of it. When
the control process ends, the socket closes: the leader removes what the ranks met in and ends, and with it, by the
parent-death signal, every rank.
"""

from __future__ import annotations

import importlib
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import msgspec
import torch

from seesaw.core.devices import device_kind
from seesaw.core.errors import SeesawError
from seesaw.core.process import die_with_parent
from seesaw.device.select import open_device
from seesaw.execution.placement import enter
from seesaw.preflight.exercise import WrongDataError, exercise, timed
from seesaw.preflight.messages import MEET, PLACE, Check, Problem, Ready, Report, Verdict
from seesaw.preflight.program import groups_of, links_in
from seesaw.transport.base import Transport
from seesaw.transport.select import create_transport, staged_for

_POSITION = struct.Struct("<i")
_SETTLE_SECONDS = 0.1
"""After the first sign of failure: a rank that dies makes others fail, and the cause may be reported later."""
_MEETING_SHARE = 0.75
"""Of the time limit, for the transport's own meeting, whose error names the ranks that did not come."""
_ORDER = ("died", "wrong", "raised")
"""Of several problems, the likelier cause first."""


class _Positions:
    """Where each rank stands, in memory that they share with the leader."""

    def __init__(self, world: int) -> None:
        self._memory = mmap.mmap(-1, world * _POSITION.size)
        for rank in range(world):
            self[rank] = PLACE

    def __getitem__(self, rank: int) -> int:
        return int(_POSITION.unpack_from(self._memory, rank * _POSITION.size)[0])

    def __setitem__(self, rank: int, step: int) -> None:
        _POSITION.pack_into(self._memory, rank * _POSITION.size, step)


# ---- a rank ------------------------------------------------------------------------------------------------


def _rank_main(check: Check, rank: int, region: int, positions: _Positions, pipe: int) -> None:
    """The life of a rank; its last word goes into `pipe`."""
    try:
        torch.set_num_threads(1)
        enter(check.places[rank])
        positions[rank] = MEET
        kind = device_kind(check.device)
        device = open_device(kind.device_name(check.places[rank].device)).torch
        transport = _connect(check, rank, region, device)
        dtype = getattr(torch, check.dtype)
        rates: dict[int, float] = {}
        for number, step in enumerate(check.steps):
            if rank not in step.members:
                continue
            positions[rank] = number
            if not step.timed:
                exercise(transport, rank, number, step, dtype, device)
            elif (rate := timed(transport, rank, step, dtype, device)) is not None:
                rates[number] = rate
        positions[rank] = len(check.steps)
        transport.flush()
        transport.close()
        report = Report(rank=rank, step=len(check.steps), kind="done", rates=rates)
    except WrongDataError as error:
        report = Report(rank=rank, step=positions[rank], kind="wrong", message=str(error))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:1000]
        report = Report(rank=rank, step=positions[rank], kind="raised", message=message)
    os.write(pipe, msgspec.json.encode(report))
    if report.kind != "done":
        signal.pause()  # ending would make its peers fail too, and hide what came first


def _connect(check: Check, rank: int, region: int, device: torch.device) -> Transport:
    transport = create_transport(
        check.transport,
        rank=rank,
        world=len(check.places),
        rendezvous=check.rendezvous,
        groups=groups_of(check.steps),
        links=links_in(check.steps),
        device=device,
        open_region=lambda: os.dup(region),
        address=check.places[rank].address,
        timeout=_MEETING_SHARE * check.limit,
        probe=False,  # the steps do, one by one, so that what hangs has a name
    )
    transport = staged_for(transport, device_kind(check.device))
    if check.wrapper:
        module, _, name = check.wrapper.partition(":")
        wrap = getattr(importlib.import_module(module), name)
        return cast(Callable[[Transport, int], Transport], wrap)(transport, rank)
    return transport


# ---- the leader --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Ranks:
    """The ranks of one attempt, as the leader sees them."""

    check: Check
    positions: _Positions
    pids: list[int] = field(default_factory=list)
    pidfds: list[int] = field(default_factory=list)
    pipes: list[int] = field(default_factory=list)
    reports: dict[int, Report] = field(default_factory=dict)
    deaths: dict[int, str] = field(default_factory=dict)
    """By rank, how it ended without a word."""

    def start(self, control: socket.socket) -> None:
        """Fork them."""
        world = len(self.check.places)
        region = -1
        if self.check.transport == "shm":
            from seesaw.transport.shared_memory import create_region

            region = create_region(world)
        leader = os.getpid()
        for rank in range(world):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                die_with_parent()
                if os.getppid() == leader:  # it may have ended before
                    control.close()
                    _rank_main(self.check, rank, region, self.positions, writer)
                os._exit(0)
            os.close(writer)
            self.pidfds.append(os.pidfd_open(pid))
            self.pids.append(pid)
            self.pipes.append(reader)
        if region >= 0:
            os.close(region)

    def watch(self, control: socket.socket) -> Problem | None:
        """Wait until all are done, one has failed, or time is up. Raises `EOFError` if the control process ends."""
        deadline = time.monotonic() + self.check.limit
        settled = False
        while not self._all_done():
            failed = bool(self.deaths) or any(r.kind != "done" for r in self.reports.values())
            if failed and not settled:
                settled = True
                deadline = min(deadline, time.monotonic() + _SETTLE_SECONDS)
            left = deadline - time.monotonic()
            if left <= 0:
                return self._failure() if failed else self._hang()
            self._take(control, left)
        return None

    def _all_done(self) -> bool:
        return len(self.reports) == len(self.pids) and all(r.kind == "done" for r in self.reports.values())

    def _take(self, control: socket.socket, seconds: float) -> None:
        quiet = [rank for rank in range(len(self.pids)) if rank not in self.reports | self.deaths]
        watched = {self.pipes[rank]: rank for rank in quiet}
        ready, _, _ = select.select([control.fileno(), *watched], [], [], seconds)
        if control.fileno() in ready:
            raise EOFError
        for pipe in ready:
            rank = watched[pipe]
            data = os.read(self.pipes[rank], 1 << 16)
            if data:
                self.reports[rank] = msgspec.json.decode(data, type=Report)
            else:
                self.deaths[rank] = _ending(self.pids[rank])

    def _failure(self) -> Problem:
        problems = [
            Problem(kind="died", step=self.positions[rank], ranks=(rank,), message=how)
            for rank, how in self.deaths.items()
        ]
        for report in self.reports.values():
            if report.kind != "done":
                problems.append(
                    Problem(kind=report.kind, step=report.step, ranks=(report.rank,), message=report.message)
                )
        return min(problems, key=lambda problem: (_ORDER.index(problem.kind), problem.step, problem.ranks))

    def _hang(self) -> Problem:
        """Who waits at the earliest step: those that are further on wait for them."""
        stuck = {rank: self.positions[rank] for rank in range(len(self.pids)) if rank not in self.reports}
        first = min(stuck.values())
        ranks = tuple(rank for rank, step in stuck.items() if step == first)
        return Problem(kind="hung", step=first, ranks=ranks)

    def rates(self) -> dict[int, float]:
        """Of each step that was timed, what the slowest rank saw."""
        found: dict[int, float] = {}
        for report in self.reports.values():
            for step, rate in report.rates.items():
                found[step] = min(rate, found.get(step, rate))
        return found

    def end(self) -> None:
        """Kill and reap what is left."""
        for pid, pidfd in zip(self.pids, self.pidfds, strict=True):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pidfd)
        for pipe in self.pipes:
            os.close(pipe)


def _ending(pid: int) -> str:
    """How a process that has closed its pipe ended; it stays to be reaped."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    if ended.si_code == os.CLD_EXITED:
        return f"ended with exit code {ended.si_status}"
    return f"was killed by {signal.Signals(ended.si_status).name}"


def _attempt(check: Check, control: socket.socket) -> Verdict:
    started = time.monotonic()
    ranks = _Ranks(check, _Positions(len(check.places)))
    try:
        ranks.start(control)
        problem = ranks.watch(control)
    except (SeesawError, OSError) as error:
        problem = Problem(kind="raised", step=MEET, ranks=(), message=str(error))
    finally:
        ranks.end()
    return Verdict(problem=problem, seconds=time.monotonic() - started, rates=ranks.rates())


def _serve(control: socket.socket) -> None:
    from seesaw.native.build import load

    load()  # compiled, if need be, before time counts
    control.sendall(msgspec.json.encode(Ready()) + b"\n")
    with control.makefile("rb") as lines:
        for line in lines:
            check = msgspec.json.decode(line, type=Check)
            try:
                verdict = _attempt(check, control)
            except EOFError:
                if check.rendezvous:
                    shutil.rmtree(check.rendezvous, ignore_errors=True)
                return
            control.sendall(msgspec.json.encode(verdict) + b"\n")


def main() -> None:
    """Serve attempts until the control process closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr  # what is printed by mistake is not part of the job's output
    with socket.socket(fileno=os.dup(0)) as control:
        try:
            _serve(control)
        except (ConnectionError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
