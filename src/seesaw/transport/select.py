"""Which transport connects the ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from seesaw.core.errors import ConfigError
from seesaw.transport.base import Members, Transport

logger = logging.getLogger(__name__)

Kind = Literal["single", "shm", "tcp", "gloo"]

KINDS = ("auto", "shm", "tcp", "gloo")
"""What may be asked for: shared memory, sockets between networks, Gloo, or the best of them."""


class SingleTransport:
    """The transport of a world of one rank: there is nobody to talk to."""

    name = "single"

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """`x` is the sum."""
        assert len(members) == 1, members
        return x

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """`x` is all there is."""
        assert len(members) == 1, members
        return [x]

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """`x` is there already."""
        assert len(members) == 1, members
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """Never called: see `receive`."""
        raise AssertionError(f"a message to rank {rank} in a world of one rank")

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """Never called: a rank does not send to itself."""
        raise AssertionError(f"a message from rank {rank} in a world of one rank")

    def flush(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """There is nothing to give up."""


def resolve_kind(kind: str, *, world: int, addresses: bool) -> Kind:
    """The transport that `kind` means here; `addresses`: every rank has an address of its own.

    The control process asks first, since shared memory (`shm`) needs a region from it (`create_region`), and
    hands the answer to the ranks. `auto` is sockets where ranks have addresses, shared memory otherwise, and
    Gloo without the native library. Raises `ConfigError` for kinds that do not exist or cannot be had.
    """
    if kind not in KINDS and kind != "single":
        raise ConfigError(f"transport: unknown kind {kind!r}; use one of {KINDS}")
    if world == 1:
        return "single"
    if kind == "single":
        raise ConfigError(f"transport: kind 'single' is for one rank, there are {world}")
    if kind == "tcp" and not addresses:
        raise ConfigError("transport: kind 'tcp' needs an address for every rank; without, use 'shm'")
    if kind in ("auto", "shm", "tcp"):
        wanted: Kind = "tcp" if kind == "tcp" or (kind == "auto" and addresses) else "shm"
        if _native(wanted):
            return wanted
        if kind != "auto":
            raise ConfigError(f"transport: kind {kind!r} needs the native library, which cannot be had here")
        logger.warning("transport: Gloo instead of %r, for want of the native library; it is slower", wanted)
    return "gloo"


def _native(kind: Kind) -> bool:
    from seesaw.transport import shared_memory, sockets

    return (sockets if kind == "tcp" else shared_memory).native_library() is not None


def create_transport(
    kind: str,
    *,
    rank: int,
    world: int,
    rendezvous: str | Path,
    groups: Sequence[Members],
    open_region: Callable[[], int] | None = None,
    address: str | None = None,
    timeout: float = 60.0,
) -> Transport:
    """This rank's end of a transport; all ranks call this with the same `kind`, `world` and `groups`.

    `rendezvous` is a directory, new for this set of ranks and closed to other users, that may go when all are
    up. `groups` lists every group of ranks that collectives will name. `open_region` gives a descriptor of the
    region that the control process made, for `shm`: it is closed here. `address` is this rank's own IP address,
    for `tcp`. Raises `ConfigError`, or `StartupError` if other ranks are not there after `timeout` seconds.
    """
    match resolve_kind(kind, world=world, addresses=address is not None):
        case "single":
            return SingleTransport()
        case "shm":
            from seesaw.transport.shared_memory import SharedMemoryTransport

            if open_region is None:
                raise ConfigError("transport: kind 'shm' needs the region that the control process makes")
            fd = open_region()
            try:
                return SharedMemoryTransport(fd, rank, world)
            finally:
                os.close(fd)
        case "tcp":
            from seesaw.transport.sockets import SocketTransport

            assert address is not None
            return SocketTransport(rank, world, rendezvous, address, timeout=timeout)
        case _:
            from seesaw.transport.gloo import GlooTransport

            return GlooTransport(rank, world, rendezvous, groups, timeout=timeout)
