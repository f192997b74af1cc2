"""Ranks as forked processes, and transports for them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from seesaw.transport.base import Link, Members, Transport
from seesaw.transport.gloo import GlooTransport
from seesaw.transport.nccl import NcclTransport
from seesaw.transport.shared_memory import SharedMemoryTransport, create_region
from seesaw.transport.sockets import SocketTransport
from seesaw.transport.staged import StagedTransport

TIMEOUT = 60.0


@dataclass
class Setup(AbstractContextManager["Setup"]):
    """What the control process prepares for one set of ranks; `connect` is called by each rank."""

    kind: str
    world: int
    options: dict[str, Any] = field(default_factory=dict)
    groups: Sequence[Members] = ()
    links: Sequence[Link] = ()
    staged: bool = False
    region: int = -1

    def __post_init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="seesaw-test-")
        if self.kind == "shm":
            self.region = create_region(self.world, **self.options)

    def connect(self, rank: int) -> Transport:
        """The rank's end."""
        if self.kind == "shm":
            transport = SharedMemoryTransport(self.region, rank, self.world)
            return StagedTransport(transport) if self.staged else transport
        where = self.directory.name
        if self.kind == "nccl":  # the class, over a backend that needs no GPU
            cpu = torch.device("cpu")
            return NcclTransport(
                rank, self.world, where, self.groups, self.links, device=cpu, timeout=TIMEOUT
            )
        if self.kind == "tcp":
            return SocketTransport(rank, self.world, where, "127.0.0.1", timeout=TIMEOUT, **self.options)
        return GlooTransport(rank, self.world, where, self.groups, timeout=TIMEOUT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.region >= 0:
            os.close(self.region)
        self.directory.cleanup()


def run_ranks(setup: Setup, body: Callable[[Transport, int], None], *, flush: bool = True) -> None:
    """Run `body(transport, rank)` on every rank; fails with the tracebacks of the ranks that raised.

    `flush`: nothing may be left under way in the end.
    """

    def rank_main(rank: int, report: Connection) -> None:
        torch.set_num_threads(1)
        try:
            transport = setup.connect(rank)
            body(transport, rank)
            if flush:
                transport.flush()
            transport.close()
            report.send("")
        except BaseException:
            report.send(traceback.format_exc())

    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(setup.world)]
    ranks = [fork.Process(target=rank_main, args=(r, pipes[r][1]), daemon=True) for r in range(setup.world)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT
    try:
        problems = []
        for number, (reader, _) in enumerate(pipes):
            wait([reader, ranks[number].sentinel], max(0.0, deadline - time.monotonic()))
            if not reader.poll():
                problems.append(f"rank {number} is stuck, or dead ({ranks[number].exitcode})")
                break
            text = reader.recv()
            if text:
                problems.append(f"rank {number}:\n{text}")
        assert not problems, "\n".join(problems)
    finally:
        for rank in ranks:
            rank.join(5.0 if not problems else 0.0)
            rank.kill()
            rank.join()
