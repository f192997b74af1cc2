"""What the transports over `torch.distributed` share: how ranks meet, groups, what is under way, how it ends."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
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

_POLL_SECONDS = 0.01


class TorchDistributed(ABC):
    """One rank's end; see `Transport`. One at a time in a process, since torch's process groups are global.

    Subclasses say how tensors are summed, how they go over the wire, and by which process group messages go.
    """

    name: str
    _backend: str
    """As torch calls it."""
    _patience: timedelta
    """After which torch gives an operation up."""

    def __init__(
        self, rank: int, world: int, directory: str | Path, groups: Sequence[Members], *, timeout: float
    ) -> None:
        """Meet the other ranks through a file in `directory`, a new one, and make the `groups`.

        `groups` lists all groups that will ever be used, the same on every rank. Raises `StartupError` naming the
        ranks that are not there after `timeout` seconds, or with what torch says.
        """
        self._rank, self._world = rank, world
        self._sending: deque[tuple[Any, Tensor]] = deque()
        """Messages under way, with the copies that are read."""
        self._groups: dict[frozenset[int], Any] = {}
        store = FileStore(str(Path(directory) / "ranks"), world)
        self._meet(store, timeout)
        try:
            self._make(store, list(dict.fromkeys(frozenset(group) for group in groups if len(group) > 1)))
        except RuntimeError as error:  # torch's own errors are all of this kind
            raise StartupError(
                f"transport: rank {rank} cannot make its groups by {self._backend}: {error}"
            ) from error

    def _meet(self, store: FileStore, timeout: float) -> None:
        store.set(f"rank{self._rank}", "here")
        deadline = time.monotonic() + timeout
        missing = list(range(self._world))
        while missing := [rank for rank in missing if not store.check([f"rank{rank}"])]:
            if time.monotonic() > deadline:
                names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                raise StartupError(
                    f"transport: rank {self._rank} waited {timeout:g} s for {names} in vain (by {self.name})"
                )
            time.sleep(_POLL_SECONDS)

    def _make(self, store: FileStore, groups: list[frozenset[int]]) -> None:
        """Make the process groups, all ranks in the same order. May raise `RuntimeError`."""
        self._begin(store)
        for members in groups:
            self._groups[members] = self._new_group(members)

    def _begin(self, store: FileStore, device: torch.device | None = None) -> None:
        """Make the group of all ranks, which torch wants before any other. `device`: open its communicator now."""
        dist.init_process_group(
            self._backend,
            store=store,
            rank=self._rank,
            world_size=self._world,
            timeout=self._patience,
            device_id=device,
        )

    def _new_group(self, members: frozenset[int]) -> Any:
        return dist.new_group(sorted(members), timeout=self._patience)

    # ---- calls --------------------------------------------------------------------------------------------

    @abstractmethod
    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`."""
        first = members[0] == self._rank
        if len(members) == 1 or not x.numel():
            return [x.clone() for _ in members] if first else None
        parts = {rank: torch.empty_like(x) for rank in sorted(members)} if first else {}
        out = [self._wire(part) for part in parts.values()] or None
        dist.gather(self._wire(x), out, dst=members[0], group=self._group(members))
        return [parts[rank] for rank in members] if first else None

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        if len(members) > 1 and x.numel():
            dist.broadcast(self._wire(x), src=members[0], group=self._group(members))
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`; sends a copy, and never waits."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        if x.numel():
            copy = x.clone()
            group, tag = self._way((self._rank, rank, channel))
            self._sending.append((dist.isend(self._wire(copy), dst=rank, group=group, tag=tag), copy))

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`. Where the device runs behind the host, what is launched next waits, and the host
        does not."""
        if x.numel():
            group, tag = self._way((rank, self._rank, channel))
            dist.recv(self._wire(x), src=rank, group=group, tag=tag)
        return x

    def flush(self) -> None:
        """See `Transport.flush`; where the device runs behind, what is launched next waits for the sends."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def close(self) -> None:
        """End the process groups. Idempotent."""
        self._groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- what differs -------------------------------------------------------------------------------------

    @abstractmethod
    def _way(self, link: Link) -> tuple[Any, int]:
        """The process group (None for that of all ranks) and the tag by which messages of `link` go."""

    def _wire(self, x: Tensor) -> Tensor:
        """`x` as the backend takes it."""
        return x

    def _group(self, members: Members) -> Any:
        group = self._groups.get(frozenset(members))
        assert group is not None, f"group {members} was not among those this transport was made for"
        return group
