"""The protocol of transports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

from torch import Tensor

Members = tuple[int, ...]
"""Ranks of a group, in the order of their indexes in it; every member names the same tuple."""
Link = tuple[int, int, int]
"""(source, destination, channel) of messages."""


class Transport(Protocol):
    """One rank's end of what connects all ranks of the world. Made once, for all layouts of a plan.

    Members of a group call its collectives in the same order. Messages between two ranks on one channel arrive
    in the order they were sent; channels are independent of each other. Tensors are contiguous, of any type and
    size, and of the same shape on all ranks that share a call. Calls come from one thread. Waiting lasts as
    long as it takes: that a peer has died is for the control process to see, and it ends all ranks.
    """

    name: str
    capturable: bool
    """Whether a CUDA graph can hold its collectives."""

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """Sum `x` over the members, in place; returns `x`. Every member gets the same bits.

        Sums of 16-bit types are made in float32, in the order of `members`, and rounded once.
        """
        ...

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """The members' tensors, in their order, on the first of them; None on the others."""
        ...

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """The first member's `x` on every member, in place; returns `x`."""
        ...

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """Send `x`, which may be changed as soon as this returns.

        Does not wait for the receiver's call while what is under way to it fits the transport's buffers.
        `channel` is 0 or 1.
        """
        ...

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """Fill `x` with the next message of `rank` on `channel`; returns `x`."""
        ...

    def flush(self) -> None:
        """Return once everything sent has left this rank's memory."""
        ...

    def close(self) -> None:
        """Give up connections and buffers; nothing may be under way."""
        ...


class PartialSums(Protocol):
    """What transports have besides whose links are slow, and carry data while the ranks compute."""

    def all_reduce_in_parts(
        self, x: Tensor, counts: Sequence[int], compute: Callable[[int], object], members: Members
    ) -> Tensor:
        """`all_reduce` of an `x` that is still to be computed: the same bits, whatever the parts.

        Part i is the next `counts[i]` elements of `x` in the order of its memory; `compute(i)` computes it, and calls
        nothing of the transport. Parts travel and are added up while the next ones are computed. `counts` are the
        same on all members, of which there are two at least; `x` is not empty.
        """
        ...


def has_partial_sums(transport: object) -> TypeGuard[PartialSums]:
    """Whether `transport` has them. It may be a stand-in that hands on what it does not know."""
    return hasattr(transport, "all_reduce_in_parts")
