"""The ranks of a node as processes that measure: one in each place, all at the same time unless asked otherwise."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from seesaw.bench.process import ContestantError, Guard, JsonProcess
from seesaw.core.devices import device_kind
from seesaw.core.node import Place
from seesaw.execution.heap import with_huge_pages
from seesaw.profiling.rank import RankConfig
from seesaw.transport.select import resolve_kind, sums_in_parts
from seesaw.transport.shared_memory import create_region

_PATIENCE = 120.0
"""Seconds for any answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """How ranks are started."""

    device: str = "cpu"
    """`cpu` or `cuda`; then rank i has device i, unless its place has another."""
    threads: int = 1
    transport: str = "auto"
    memory: int = 256 << 20
    """Bytes that each rank cuts operands from: well beyond any cache."""
    host_memory: int = 256 << 20
    """Bytes of host memory beside each rank, for copies of KV."""


class Node:
    """Starts the ranks; `close`, or leaving the context, ends them. Owns the transport's memory."""

    def __init__(self, places: Sequence[Place], options: NodeOptions, group_sizes: Sequence[int]) -> None:
        """Raises `ConfigError` for a transport that cannot be had."""
        self.world = len(places)
        self.options = options
        self.partial_sums = False
        """Whether sums over ranks travel while they are computed."""
        self._stack = ExitStack()
        try:
            self._ranks = self._start(places, list(group_sizes))
        except BaseException:
            self._stack.close()
            raise

    def all(self, op: str, budget: float, **arguments: Any) -> list[float | None]:
        """What each rank measured, all at the same time. Raises `ContestantError` if one fails."""
        return self._measure(self._ranks, op, budget, arguments)

    def one(self, op: str, budget: float, **arguments: Any) -> float:
        """What the first rank measures alone. Raises `ContestantError` if it fails."""
        (value,) = self._measure(self._ranks[:1], op, budget, arguments)
        assert value is not None, op
        return value

    def close(self) -> None:
        """End the ranks."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, places: Sequence[Place], group_sizes: list[int]) -> list[JsonProcess]:
        options = self.options
        addresses = all(place.address for place in places)
        own = device_kind(options.device).transport
        kind = resolve_kind(options.transport, world=self.world, addresses=addresses, own=own)
        self.partial_sums = sums_in_parts(kind)
        region = ""
        if kind == "shm":
            fd = create_region(self.world)
            self._stack.callback(os.close, fd)
            region = f"/proc/{os.getpid()}/fd/{fd}"
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="seesaw-profile-"))
        guard = self._stack.enter_context(Guard())
        ranks = []
        for rank, place in enumerate(places):
            config = RankConfig(
                rank=rank,
                world=self.world,
                place=place,
                device=device_kind(options.device).device_name(
                    rank if place.device is None else place.device
                ),
                threads=options.threads,
                transport=kind,
                transport_region=region,
                rendezvous=folder,
                group_sizes=group_sizes,
                memory=options.memory,
                host_memory=options.host_memory,
            )
            ranks.append(self._start_rank(config, guard, Path(folder)))
        return ranks

    def _start_rank(self, config: RankConfig, guard: Guard, folder: Path) -> JsonProcess:
        process = JsonProcess(
            [sys.executable, "-m", "seesaw.profiling.rank"],
            guard=guard,
            log=folder / f"rank{config.rank}.log",
            environment=with_huge_pages({**os.environ, "OMP_NUM_THREADS": str(config.threads)}),
        )
        self._stack.callback(process.close)
        process.send(msgspec.to_builtins(config))
        return process

    def _measure(
        self, ranks: Sequence[JsonProcess], op: str, budget: float, arguments: dict[str, Any]
    ) -> list[float | None]:
        prepare = {"op": "prepare", "of": op, "arguments": arguments}
        _ask(ranks, prepare)
        return _ask(ranks, {"op": "run", "told": time.monotonic(), "budget": budget})


def _ask(ranks: Sequence[JsonProcess], message: dict[str, Any]) -> list[float | None]:
    """Every rank's answer; all are taken in before one that is an error is raised, so that the ranks can go on."""
    for rank in ranks:
        rank.send(message)
    values: list[float | None] = []
    errors: list[ContestantError] = []
    for rank in ranks:
        try:
            values.append(rank.receive(_PATIENCE)["value"])
        except ContestantError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return values
