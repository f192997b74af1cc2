"""`NcclTransport`: GPUs that talk to each other, by `torch.distributed`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from seesaw.core.errors import StartupError
from seesaw.transport.base import Link, Members


class NcclTransport:
    """One rank's end of NCCL's communicators; see `Transport`. One at a time in a process.

    Collectives and messages are launched behind what the calling thread's stream holds, and hold that stream back
    until they are done; the host waits for none of them. NCCL adds in an order and a precision of its own, the same
    bits for every member. Each link has a communicator: on one that carried both ways, two ranks that first send
    and then receive would wait for each other, since NCCL does not buffer.
    """

    name = "nccl"
    capturable = True

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
        backend: str = "nccl",
    ) -> None:
        """Meet the other ranks through a file in `directory`, a new one, and open every communicator.

        `groups` and `links` list all that will ever be used, the same on every rank. `backend` is another one of
        torch's only where this class is tested. Raises `StartupError` if the ranks do not meet within `timeout`
        seconds, or a communicator cannot be had, with what NCCL says.
        """
        self._rank = rank
        self._sending: deque[tuple[Any, Tensor]] = deque()
        """Messages under way, with the copies that are read."""
        self._groups: dict[frozenset[int], Any] = {}
        self._links: dict[Link, Any] = {}
        store = FileStore(str(Path(directory) / "nccl"), world)
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
                device_id=device if backend == "nccl" else None,
            )
            for members in groups:
                key = frozenset(members)
                if len(key) > 1 and key not in self._groups:
                    self._groups[key] = dist.new_group(sorted(key))
            for link in dict.fromkeys(links):
                self._links[link] = dist.new_group(sorted(link[:2]))
            self._open(device)
        except RuntimeError as error:  # torch's own errors are all of this kind
            raise StartupError(
                f"transport: rank {rank} did not reach all {world} ranks by {backend} within {timeout:g} s: {error}"
            ) from error

    def _open(self, device: torch.device) -> None:
        """Use each communicator once, since NCCL makes them at first use: what is wrong with one is said now."""
        probe = torch.ones(1, device=device)
        for members, group in self._groups.items():
            if self._rank in members:
                dist.all_reduce(probe, group=group)
        for (source, destination, _), group in self._links.items():
            if self._rank == source:
                dist.send(probe, dst=destination, group=group)
            elif self._rank == destination:
                dist.recv(probe, src=source, group=group)

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`; the order of sums is NCCL's."""
        if len(members) > 1 and x.numel():
            dist.all_reduce(x, group=self._group(members))
        return x

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`."""
        first = members[0] == self._rank
        if len(members) == 1 or not x.numel():
            return [x.clone() for _ in members] if first else None
        parts = {rank: torch.empty_like(x) for rank in sorted(members)} if first else {}
        dist.gather(x, list(parts.values()) or None, dst=members[0], group=self._group(members))
        return [parts[rank] for rank in members] if first else None

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        if len(members) > 1 and x.numel():
            dist.broadcast(x, src=members[0], group=self._group(members))
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`; sends a copy, beside what is computed next."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        if x.numel():
            copy = x.clone()
            group = self._links[self._rank, rank, channel]
            self._sending.append((dist.isend(copy, dst=rank, group=group), copy))

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`; what is launched next waits for the message, the host does not."""
        if x.numel():
            work = dist.irecv(x, src=rank, group=self._links[rank, self._rank, channel])
            assert work is not None
            work.wait()
        return x

    def flush(self) -> None:
        """See `Transport.flush`."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def close(self) -> None:
        """End the communicators. Idempotent."""
        self._groups.clear()
        self._links.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _group(self, members: Members) -> Any:
        group = self._groups.get(frozenset(members))
        assert group is not None, f"group {members} was not among those this transport was made for"
        return group
