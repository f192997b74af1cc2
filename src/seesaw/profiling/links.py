"""All-reduces and hand-overs over the engine's transports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seesaw.core.devices import kind_of
from seesaw.profiling.clock import Call, Span, together, waited
from seesaw.transport.base import Link, Members, Transport


def groups_of(world: int, size: int) -> list[Members]:
    """Neighbouring ranks in groups of `size`; ranks that are left over are in none."""
    return [tuple(range(first, first + size)) for first in range(0, world - size + 1, size)]


def all_groups(world: int, sizes: Sequence[int]) -> list[Members]:
    """Every group that measurements with these sizes name."""
    return list(dict.fromkeys(group for size in {2, *sizes} for group in groups_of(world, size)))


def neighbours(world: int) -> list[Link]:
    """Every message that measurements send."""
    pairs = groups_of(world, 2)
    return [(a, b, 0) for a, b in pairs] + [(b, a, 0) for a, b in pairs]


@dataclass(frozen=True, slots=True)
class Links:
    """One rank's end. All ranks call the same methods with the same arguments at about the same time."""

    transport: Transport
    rank: int
    world: int
    device: str

    def all_reduce(self, span: Span, before: Call, *, size: int, count: int, dtype: str) -> float | None:
        """Seconds for `count` bytes in groups of `size` ranks, all groups at once; None on ranks in no group.

        Each comes after `before`, which takes all ranks about as long: waiting for the last one is part of it.
        """
        x = self._tensor(count, dtype)
        return self._measure(span, size, lambda members: self.transport.all_reduce(x, members), before)

    def waiting(self, span: Span, work: Sequence[Call], *, size: int, dtype: str) -> float | None:
        """The share of `work`'s time for which a rank waits for the slowest of its group of `size`, and for the
        all-reduce of 4 KiB that they meet in; None on ranks in no group."""
        x, members = self._tensor(4096, dtype), self._members(size)
        if members is None:
            return None
        return waited(work, lambda: self.transport.all_reduce(x, members), self._agree(members), span)

    def send(self, span: Span, *, count: int, dtype: str) -> float | None:
        """Half the seconds of a message to the neighbour and back, all pairs at once; None without a neighbour."""
        x = self._tensor(count, dtype)

        def there_and_back(members: Members) -> None:
            first = self.rank == members[0]
            other = members[first]
            if first:
                self.transport.send(x, other, 0)
            self.transport.receive(x, other, 0)
            if not first:
                self.transport.send(x, other, 0)

        seconds = self._measure(span, 2, there_and_back)
        return None if seconds is None else seconds / 2

    def _measure(
        self, span: Span, size: int, call: Callable[[Members], object], before: Call | None = None
    ) -> float | None:
        members = self._members(size)
        if members is None:
            return None
        agree = self._agree(members)
        if kind_of(self.device).runs_behind:  # caches hardly matter there, and waiting for the device does
            return together(lambda: call(members), agree, span, settle=torch.accelerator.synchronize)
        return together(lambda: call(members), agree, span, before)

    def _members(self, size: int) -> Members | None:
        return next((group for group in groups_of(self.world, size) if self.rank in group), None)

    def _agree(self, members: Members) -> Callable[[int], int]:
        """What takes the first member's number to all."""
        return lambda number: int(
            self.transport.broadcast(torch.tensor([number], device=self.device), members)
        )

    def _tensor(self, count: int, dtype: str) -> Tensor:
        element: torch.dtype = getattr(torch, dtype)
        return torch.zeros(max(1, count // element.itemsize), dtype=element, device=self.device)
