"""Transports that fail in one way each, put between ranks and the real one by `Check.wrapper`."""

from __future__ import annotations

import os
import signal
import time

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


def corrupt_shm(transport: Transport, rank: int) -> Transport:
    """Only shared memory is broken."""
    return Corrupting(transport, rank) if transport.name == "shm" else transport


def hang_shm(transport: Transport, rank: int) -> Transport:
    return Hanging(transport, rank) if transport.name == "shm" else transport


def raise_shm(transport: Transport, rank: int) -> Transport:
    return Raising(transport, rank) if transport.name == "shm" else transport


def die_shm(transport: Transport, rank: int) -> Transport:
    return Dying(transport, rank) if transport.name == "shm" else transport


def stale_shm(transport: Transport, rank: int) -> Transport:
    return Stale(transport, rank) if transport.name == "shm" else transport


def die_tcp(transport: Transport, rank: int) -> Transport:
    return Dying(transport, rank) if transport.name == "tcp" else transport


def corrupt_native(transport: Transport, rank: int) -> Transport:
    """All but Gloo are broken."""
    return transport if transport.name == "gloo" else Corrupting(transport, rank)


def corrupt_all(transport: Transport, rank: int) -> Transport:
    return Corrupting(transport, rank)
