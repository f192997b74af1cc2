"""Where ranks run: the network namespace, control groups and cores of each, read from a JSON file.

    {"ranks": [{"address": "10.77.0.1", "interface": "eth0", "netns": "/proc/123/ns/net",
                "cgroups": ["/sys/fs/cgroup/cpu/rank0"], "cores": [0]},
               {"address": "10.77.0.2", "interface": "eth0", "netns": "/proc/124/ns/net"}]}

Every field may be left out: the rank then stays where its process was started.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import msgspec

from seesaw.core.errors import ConfigError


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one rank runs."""

    address: str | None = None
    """IP address at which the other ranks reach this one; None is the machine's loopback address."""
    interface: str | None = None
    """Network interface that has the address."""
    netns: str | None = None
    """Path of the network namespace to enter, such as `/proc/123/ns/net`."""
    cgroups: list[str] = []
    """Directories of the control groups to join, one per hierarchy."""
    cores: list[int] = []
    """Processor cores to bind to; empty leaves the rank unbound."""
    device: int | None = None
    """Number of its device among those visible, where ranks have such; None shares them out in order."""


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The places of all ranks of a node, in the order of the ranks."""

    ranks: list[Place]


def places_on_cores(ranks: int, threads: int) -> list[Place]:
    """Neighbouring cores of this process for each rank; ranks share cores in turn when there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    return [
        Place(cores=sorted({cores[(rank * threads + i) % len(cores)] for i in range(threads)}))
        for rank in range(ranks)
    ]


def load_node(path: str | os.PathLike[str]) -> Node:
    """The node that the JSON file at `path` describes.

    Raises `ConfigError` if it cannot be read, is not such a description, or if its ranks could not meet.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"node file {os.fspath(path)}: cannot be read: {error.strerror}") from None
    try:
        node = msgspec.json.decode(data, type=Node)
    except msgspec.DecodeError as error:
        raise ConfigError(f"node file {os.fspath(path)}: {error}") from None
    problem = _problem(node)
    if problem:
        raise ConfigError(f"node file {os.fspath(path)}: {problem}")
    return node


def _problem(node: Node) -> str | None:
    if not node.ranks:
        return "has no ranks; give at least one place under `ranks`"
    without = [rank for rank, place in enumerate(node.ranks) if place.address is None]
    if without and len(without) < len(node.ranks):
        return f"ranks {without} have no address while others have one; give all an address or none"
    undecided = [rank for rank, place in enumerate(node.ranks) if place.device is None]
    if undecided and len(undecided) < len(node.ranks):
        return f"ranks {undecided} have no device while others have one; give all a device or none"
    seen: dict[str, int] = {}
    for rank, place in enumerate(node.ranks):
        problem = _place_problem(place)
        if problem is None and place.netns is not None and place.address is not None:
            other = seen.setdefault(place.address, rank)
            if other != rank:
                problem = f"has the address {place.address} of rank {other}; give each namespace its own"
        if problem:
            return f"rank {rank} {problem}"
    return None


def _place_problem(place: Place) -> str | None:
    if place.address is not None:
        try:
            ipaddress.ip_address(place.address)
        except ValueError:
            return f"has the address {place.address!r}, which is not an IP address such as 10.77.0.1"
    if place.netns is not None and place.address is None:
        return f"enters the namespace {place.netns} but has no address there; give `address`"
    if place.device is not None and place.device < 0:
        return f"has the device {place.device}; devices are numbered from 0"
    if any(core < 0 for core in place.cores):
        return f"has the cores {place.cores}; cores are numbered from 0"
    paths = [*place.cgroups, *([place.netns] if place.netns is not None else [])]
    relative = [path for path in paths if not os.path.isabs(path)]
    if relative:
        return f"names {relative[0]!r}; write the paths of namespaces and control groups in full"
    return None
