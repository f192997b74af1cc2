"""Transports that fail in one way each, put between ranks and the real one by `Check.wrapper`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor

from seesaw.transport.base import Members, Transport

LARGE = 1 << 19
"""Bytes above which a fault strikes; small messages pass."""


class Passing:
    """Hands every call on."""

    def __init__(self, transport: Transport, rank: int) -> None:
        self._transport, self._rank = transport, rank
        self.name = transport.name

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        return self._transport.all_reduce(x, members)

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        return self._transport.gather(x, members)

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        return self._transport.broadcast(x, members)

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        self._transport.send(x, rank, channel)

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        return self._transport.receive(x, rank, channel)

    def flush(self) -> None:
        self._transport.flush()

    def close(self) -> None:
        self._transport.close()


class Corrupting(Passing):
    """One byte of large sums is wrong on rank 1."""

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        super().all_reduce(x, members)
        if self._rank == 1 and x.nbytes > LARGE:
            x.view(torch.uint8)[128] ^= 1
        return x


class Hanging(Passing):
    """Rank 1 never comes out of a gather."""

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        if self._rank == 1:
            time.sleep(3600)
        return super().gather(x, members)


class Raising(Passing):
    """Rank 0 cannot send large messages."""

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        if x.nbytes > LARGE:
            raise ConnectionError("the link is down")
        super().send(x, rank, channel)


class Dying(Passing):
    """Rank 1 is killed in a broadcast."""

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        if self._rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().broadcast(x, members)


class Stale(Passing):
    """A receive gives what came before."""

    _last: Tensor | None = None

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        super().receive(x, rank, channel)
        before, self._last = self._last, x.clone()
        return x if before is None or before.shape != x.shape else x.copy_(before)


class Mixing(Passing):
    """The parts of a gather come in the wrong order."""

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        parts = super().gather(x, members)
        return None if parts is None else parts[::-1]


class Leaving(Passing):
    """Rank 1 ends without a word."""

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        if self._rank == 1 and x.nbytes > 8:
            os._exit(7)
        return super().all_reduce(x, members)


def _broken(kind: str, fault: type[Passing]) -> Callable[[Transport, int], Transport]:
    """A wrapper that breaks transports of one kind."""

    def wrap(transport: Transport, rank: int) -> Transport:
        return fault(transport, rank) if transport.name == kind else transport

    return wrap


corrupt_shm = _broken("shm", Corrupting)
hang_shm, hang_tcp = _broken("shm", Hanging), _broken("tcp", Hanging)
raise_shm = _broken("shm", Raising)
die_shm, die_tcp = _broken("shm", Dying), _broken("tcp", Dying)
leave_shm = _broken("shm", Leaving)
stale_shm = _broken("shm", Stale)
mix_shm = _broken("shm", Mixing)


def corrupt_native(transport: Transport, rank: int) -> Transport:
    """All but Gloo are broken."""
    return transport if transport.name == "gloo" else Corrupting(transport, rank)


corrupt_all = Corrupting


class NoPeers(Passing):
    """Rank 1 never hears of rank 0 while GPUs are to reach each other's memory."""

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        if self._transport.name == "nccl" and os.environ.get("NCCL_P2P_DISABLE") != "1" and self._rank == 1:
            time.sleep(3600)
        return super().receive(x, rank, channel)


class NoNccl(Passing):
    """Rank 1 never hears of rank 0 by NCCL."""

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        if self._transport.name == "nccl" and self._rank == 1:
            time.sleep(3600)
        return super().receive(x, rank, channel)


no_peers, no_nccl = NoPeers, NoNccl
