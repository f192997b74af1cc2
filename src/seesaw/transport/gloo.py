"""`GlooTransport`: `torch.distributed`, where there is no native library."""

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
from seesaw.transport.base import Members


class GlooTransport:
    """One rank's end of Gloo's process groups; see `Transport`. One at a time in a process.

    Everything but integer sums moves as bytes, and floats are added up here rather than by Gloo, whose order is
    its own: so a sum has the same bits as with every other transport, at the price of more traffic between
    three ranks and more.
    """

    name = "gloo"
    capturable = False

    def __init__(
        self,
        rank: int,
        world: int,
        directory: str | Path,
        groups: Sequence[Members],
        *,
        timeout: float,
    ) -> None:
        """Meet the other ranks through a file in `directory`, a new one.

        `groups` lists all groups that will ever be used, the same on every rank. Raises `StartupError` after
        `timeout` seconds without the others.
        """
        self._rank = rank
        self._sending: deque[tuple[Any, Tensor]] = deque()
        """Sends in progress with the copies they read."""
        self._groups: dict[frozenset[int], Any] = {}
        limit = timedelta(seconds=timeout)
        store = FileStore(str(Path(directory) / "gloo"), world)
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
            for members in groups:
                key = frozenset(members)
                if len(key) > 1 and key not in self._groups:
                    self._groups[key] = dist.new_group(sorted(key))
        except RuntimeError as error:  # torch's own errors are all of this kind
            raise StartupError(
                f"transport: rank {rank} did not meet all {world} ranks within {timeout:g} s: {error}"
            ) from error

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""
        if len(members) > 1 and x.numel():
            group = self._group(members)
            if not x.is_floating_point():
                dist.all_reduce(x, group=group)
                return x
            parts = {rank: torch.empty_like(x) for rank in sorted(members)}
            dist.all_gather([_bytes(part) for part in parts.values()], _bytes(x), group=group)
            exact = torch.promote_types(x.dtype, torch.float32)
            total = parts[members[0]].to(exact)
            for rank in members[1:]:
                total += parts[rank]
            x.copy_(total)
        return x

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`."""
        first = members[0] == self._rank
        if len(members) == 1 or not x.numel():
            return [x.clone() for _ in members] if first else None
        parts = {rank: torch.empty_like(x) for rank in sorted(members)} if first else {}
        out = [_bytes(part) for part in parts.values()] if first else None
        dist.gather(_bytes(x), out, dst=members[0], group=self._group(members))
        return [parts[rank] for rank in members] if first else None

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        if len(members) > 1 and x.numel():
            dist.broadcast(_bytes(x), src=members[0], group=self._group(members))
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`; sends a copy, and never waits."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        if x.numel():
            copy = x.clone()
            self._sending.append((dist.isend(_bytes(copy), dst=rank, tag=channel + 1), copy))

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`."""
        if x.numel():
            dist.recv(_bytes(x), src=rank, tag=channel + 1)
        return x

    def flush(self) -> None:
        """Wait for all sends."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def close(self) -> None:
        """End the process groups. Idempotent."""
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _group(self, members: Members) -> Any:
        group = self._groups.get(frozenset(members))
        assert group is not None, f"group {members} was not among those this transport was made for"
        return group


def _bytes(x: Tensor) -> Tensor:
    """The memory of `x`; Gloo does not know every type."""
    assert x.is_contiguous(), x.stride()
    return x.view(-1).view(torch.uint8)
