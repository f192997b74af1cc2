"""Which transport a kind means, and making one of each kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from seesaw.core.devices import CPU, CUDA
from seesaw.core.errors import ConfigError, StartupError
from seesaw.transport.base import Transport
from seesaw.transport.gloo import GlooTransport
from seesaw.transport.select import SingleTransport, create_transport, resolve_kind, staged_for
from tests.transport.ranks import Setup, run_ranks


@pytest.mark.parametrize(
    ("kind", "world", "addresses", "native", "expected"),
    [
        ("auto", 1, False, True, "single"),
        ("tcp", 1, False, True, "single"),
        ("auto", 2, False, True, "shm"),
        ("auto", 2, True, True, "tcp"),
        ("auto", 2, False, False, "gloo"),
        ("auto", 2, True, False, "gloo"),
        ("shm", 4, True, True, "shm"),
        ("tcp", 4, True, True, "tcp"),
        ("gloo", 4, True, True, "gloo"),
        ("single", 1, False, False, "single"),
    ],
)
def test_kinds(
    kind: str, world: int, addresses: bool, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv("SEESAW_NATIVE", "0")
    assert resolve_kind(kind, world=world, addresses=addresses) == expected


@pytest.mark.parametrize(
    ("kind", "native", "message"),
    [
        (
            "mpi",
            True,
            r"unknown kind 'mpi'; use one of \('auto', 'nccl', 'nccl-no-p2p', 'shm', 'tcp', 'gloo'\)",
        ),
        ("nccl", True, "needs a GPU of its own for every rank"),
        ("nccl-no-p2p", True, "'nccl-no-p2p' needs a GPU of its own for every rank"),
        ("tcp", True, "needs an address for every rank"),
        ("shm", False, "needs the native library"),
        ("single", True, "is for one rank, there are 2"),
    ],
)
def test_kinds_that_cannot_be(kind: str, native: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("SEESAW_NATIVE", "0")
    with pytest.raises(ConfigError, match=message):
        resolve_kind(kind, world=2, addresses=False)


def test_devices_with_a_transport_of_their_own() -> None:
    for kind in ("auto", "nccl"):
        assert resolve_kind(kind, world=2, addresses=False, own="nccl") == "nccl"
    assert resolve_kind("nccl-no-p2p", world=2, addresses=False, own="nccl") == "nccl-no-p2p"
    assert resolve_kind("gloo", world=2, addresses=False, own="nccl") == "gloo"
    assert resolve_kind("auto", world=1, addresses=False, own="nccl") == "single"


def test_devices_go_by_way_of_the_host_where_the_transport_does() -> None:
    single = SingleTransport()
    assert staged_for(single, CUDA) is single

    class Named(SingleTransport):
        def __init__(self, name: str) -> None:
            self.name = name

    for name in ("shm", "nccl"):
        assert staged_for(Named(name), CPU).name == name
    assert staged_for(Named("nccl"), CUDA).name == "nccl"
    assert staged_for(Named("shm"), CUDA).name == "shm, staged"


@pytest.mark.parametrize("kind", ["shm", "tcp", "gloo"])
def test_each_kind_is_made_and_works(kind: str) -> None:
    groups = [(0, 1)]

    class Selected(Setup):
        def connect(self, rank: int) -> Transport:
            return create_transport(
                kind,
                rank=rank,
                world=2,
                rendezvous=self.directory.name,
                groups=groups,
                open_region=lambda: os.dup(self.region),
                address="127.0.0.1" if kind == "tcp" else None,
            )

    def body(transport: Transport, rank: int) -> None:
        assert transport.name == kind
        assert transport.all_reduce(torch.tensor([rank + 1.0]), (0, 1)).item() == 3.0

    with Selected(kind, 2) as setup:
        run_ranks(setup, body)


def test_a_world_of_one_needs_nothing(tmp_path: Path) -> None:
    transport = create_transport("auto", rank=0, world=1, rendezvous=tmp_path / "none", groups=[(0,)])
    x = torch.ones(3)
    assert transport.all_reduce(x, (0,)) is x and transport.broadcast(x, (0,)) is x
    assert transport.gather(x, (0,)) == [x]
    transport.flush()
    transport.close()


def test_shared_memory_needs_its_region(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the region that the control process makes"):
        create_transport("shm", rank=0, world=2, rendezvous=tmp_path, groups=[])


def test_gloo_gives_up_on_absent_ranks() -> None:
    class Alone(Setup):
        def connect(self, rank: int) -> Transport:
            with pytest.raises(StartupError, match=r"rank 0 waited 0\.5 s for rank 1 in vain \(by gloo\)"):
                GlooTransport(0, 2, self.directory.name, [], timeout=0.5)
            return create_transport("auto", rank=0, world=1, rendezvous="", groups=[])

    with Alone("gloo", 1) as setup:
        run_ranks(setup, lambda transport, rank: None)
