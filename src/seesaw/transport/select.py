"""Which transport connects the ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from seesaw.core.devices import DeviceKind
from seesaw.core.errors import ConfigError
from seesaw.transport.base import Link, Members, Transport

logger = logging.getLogger(__name__)

Kind = Literal["single", "nccl", "nccl-no-p2p", "shm", "tcp", "gloo"]

KINDS = ("auto", "nccl", "nccl-no-p2p", "shm", "tcp", "gloo")
"""What may be asked for: GPUs among themselves, the same without reaching into each other's memory, shared memory,
sockets between networks, Gloo, or the best."""
_BY_NCCL: tuple[Kind, ...] = ("nccl", "nccl-no-p2p")


class SingleTransport:
    """The transport of a world of one rank: there is nobody to talk to."""

    name = "single"
    capturable = False

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


def resolve_kind(kind: str, *, world: int, addresses: bool, own: Kind | None = None) -> Kind:
    """The transport that `kind` means here; `addresses`: every rank has an address of its own.

    `own` is what connects the ranks' devices without the host, None where they have no such thing.

    The control process asks first, since shared memory (`shm`) needs a region from it (`create_region`), and
    hands the answer to the ranks. `auto` is `own` if there is one, else sockets where ranks have addresses, else
    shared memory, and Gloo without the native library. Raises `ConfigError` for kinds that do not exist, or
    cannot be had.
    """
    if kind not in KINDS and kind != "single":
        raise ConfigError(f"transport: unknown kind {kind!r}; use one of {KINDS}")
    if world == 1:
        return "single"
    if kind == "single":
        raise ConfigError(f"transport: kind 'single' is for one rank, there are {world}")
    for by_nccl in _BY_NCCL:
        if kind == by_nccl:
            if own != "nccl":
                raise ConfigError(
                    f"transport: kind {kind!r} needs a GPU of its own for every rank; without, use 'shm'"
                )
            return by_nccl
    if own is not None and kind == "auto":
        return own
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


def sums_in_parts(kind: Kind) -> bool:
    """Whether ranks of this kind of transport have `PartialSums`."""
    return kind == "tcp"


def staged_for(transport: Transport, kind: DeviceKind) -> Transport:
    """`transport` as ranks on such devices can use it: by way of the host where it takes host memory alone."""
    if kind.on_host or transport.name in ("single", kind.transport):
        return transport
    from seesaw.transport.staged import StagedTransport

    logger.info("transport: %s, by way of host memory: each exchange waits for the device", transport.name)
    return StagedTransport(transport)


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
    links: Sequence[Link] = (),
    device: torch.device | None = None,
    probe: bool = True,
) -> Transport:
    """This rank's end of a transport; all ranks call this with the same `kind`, `world` and `groups`.

    `rendezvous` is a directory, new for this set of ranks and closed to other users, that may go when all are
    up. `groups` lists every group of ranks that collectives will name. `open_region` gives a descriptor of the
    region that the control process made, for `shm`: it is closed here. `address` is this rank's own IP address,
    for `tcp`. `links` lists every (source, destination, channel) of messages, and `device` is this rank's own, for
    `nccl`, which uses each of them once if it is to `probe`; the others take tensors in host memory (`staged_for`).
    Raises `ConfigError`, or `StartupError` if other ranks are not there after `timeout` seconds.
    """
    own: Kind | None = "nccl" if kind in _BY_NCCL and device is not None else None
    match resolve_kind(kind, world=world, addresses=address is not None, own=own):
        case "single":
            return SingleTransport()
        case ("nccl" | "nccl-no-p2p") as found:
            from seesaw.transport.nccl import NcclTransport

            assert device is not None
            return NcclTransport(
                rank,
                world,
                rendezvous,
                groups,
                links,
                device=device,
                timeout=timeout,
                peer_to_peer=found == "nccl",
                probe=probe,
            )
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
