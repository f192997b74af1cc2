"""`NcclTransport`: GPUs that talk to each other, by `torch.distributed`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from seesaw.core.devices import kind_of
from seesaw.core.workspace import CHANNEL_LIMITS, lane_of
from seesaw.transport.base import Link, Members
from seesaw.transport.torch_distributed import TorchDistributed

logger = logging.getLogger(__name__)

NO_P2P = "NCCL_P2P_DISABLE"
"""Of the environment: whether GPUs leave each other's memory alone, and talk through that of the host."""
_QUIET = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
"""Torch warns that messages of one group go one after the other. We know: see `NcclTransport`."""


class NcclTransport(TorchDistributed):
    """One rank's end of NCCL's communicators; see `Transport`. One at a time in a process.

    Collectives and messages are launched behind what the calling thread's stream holds, and hold that stream back
    until they are done; the host waits for none of them. NCCL adds in an order and a precision of its own, the same
    bits for every member.

    NCCL does not buffer, and what one communicator carries goes in the order of its calls. So a rank's sends and
    receives must not share one: two ranks that first send and then receive would wait for each other, and a stage
    could not take its next input before the stage behind it had taken the last output. Messages go by lanes
    (`core.workspace.lane_of`), few communicators of all ranks, on each of which a rank only sends or only receives.
    Within its sends a rank keeps the order in which it runs Forwards, and so do those that receive them: of all
    messages under way, the one of the earliest Forward can always be taken.

    The group of all ranks, from which torch splits the others, carries the first lane, and a layout whose collectives
    take all ranks: such a layout sends no messages, and one layout follows the other on every rank.
    """

    name = "nccl"
    _patience = timedelta(minutes=10)
    """After which torch ends a process whose NCCL is stuck, as that of a rank that was lost."""

    def __init__(
        self,
        rank: int,
        world: int,
        directory: str | Path,
        groups: Sequence[Members],
        links: Sequence[Link],
        *,
        device: torch.device,
        timeout: float,
        peer_to_peer: bool = True,
        probe: bool = True,
    ) -> None:
        """Meet the other ranks through a file in `directory`, a new one, and open every communicator.

        `groups` and `links` list all that will ever be used, the same on every rank. On a `device` that is no GPU
        Gloo takes NCCL's place, as in tests. Without `peer_to_peer` GPUs do not reach into each other's memory.
        `probe`: use all of them once, since NCCL connects ranks at first use: memory is taken now, and what is wrong
        shows now. Raises `StartupError` if the ranks do not meet within `timeout` seconds, or a communicator cannot
        be had, with what NCCL says.
        """
        self._device = device
        self._backend = kind_of(str(device)).transport or "gloo"
        self._pairs = list(dict.fromkeys((source, destination) for source, destination, _ in links))
        self._lanes: dict[int, Any] = {}
        self._probe_groups = (
            list(dict.fromkeys(group for group in groups if len(group) > 1)) if probe else None
        )
        for line in settle_environment(peer_to_peer=peer_to_peer):
            if rank == 0:
                logger.info("%s", line)
        super().__init__(rank, world, directory, groups, timeout=timeout)

    def _make(self, store: FileStore, groups: list[frozenset[int]]) -> None:
        """Open communicators; none if the ranks have nothing to say to each other."""
        if not groups and not self._pairs:
            return
        self._begin(store, self._device if self._backend == self.name else None)
        everyone = frozenset(range(self._world))
        for members in groups:
            self._groups[members] = dist.group.WORLD if members == everyone else self._new_group(members)
        for number, lane in enumerate(sorted({lane_of(*pair) for pair in self._pairs})):
            self._lanes[lane] = self._new_group(everyone) if number else dist.group.WORLD
        if self._probe_groups is not None:
            self._probe(self._probe_groups)

    def _probe(self, groups: list[Members]) -> None:
        x = torch.ones(1, device=self._device)
        for members in groups:
            if self._rank in members:
                self.all_reduce(x, members)
                self.gather(x, members)
        for source, destination in self._pairs:
            group = self._lanes[lane_of(source, destination)]
            if self._rank == source:
                dist.send(x, dst=destination, group=group)
            elif self._rank == destination:
                dist.recv(x, src=source, group=group)
        x.cpu()  # wait for all of it

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`; the order of sums is NCCL's."""
        if len(members) > 1 and x.numel():
            dist.all_reduce(x, group=self._group(members))
        return x

    def close(self) -> None:
        """End the communicators. Idempotent."""
        self._lanes.clear()
        super().close()

    def _way(self, link: Link) -> tuple[Any, int]:
        return self._lanes[lane_of(*link[:2])], 0


def settle_environment(*, peer_to_peer: bool) -> list[str]:
    """Set what NCCL reads when it starts in this process; returns lines about settings that are not what the memory
    plan counts on.

    Settings of the user stay.
    """
    os.environ.setdefault(_QUIET, "false")
    if not peer_to_peer:
        os.environ[NO_P2P] = "1"
    lines = []
    for name, most in CHANNEL_LIMITS.items():
        given = os.environ.setdefault(name, str(most))
        with suppress(ValueError):
            if int(given) <= most:
                continue
        lines.append(
            f"{name}={given}: the memory plan counts on at most {most}, so NCCL may take GPU memory that it does not "
            "have; leave more free with --device-memory if ranks run out"
        )
    return lines
