"""What is particular to the shared region."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from seesaw.core.errors import ConfigError
from seesaw.transport import shared_memory
from seesaw.transport.base import Transport
from seesaw.transport.region import region_bytes
from seesaw.transport.shared_memory import SharedMemoryTransport, cpu_quota, create_region
from tests.transport.ranks import Setup, run_ranks


def resident_bytes(fd: int) -> int:
    """Pages of a region that exist."""
    return os.fstat(fd).st_blocks * 512


def test_messages_use_the_same_pages_again() -> None:
    """A hundred times what is ever under way passes through the ring; only that much memory comes to be."""
    x = torch.zeros(1 << 20, dtype=torch.uint8)

    def body(transport: Transport, rank: int) -> None:
        token = torch.zeros(1)
        for _ in range(100):
            for _ in range(3):
                transport.send(x, 1, 0) if rank == 0 else transport.receive(x, 0, 0)
            transport.all_reduce(token, (0, 1))

    with Setup("shm", 2) as setup:
        before = resident_bytes(setup.region)
        run_ranks(setup, body)
        assert before < 1 << 20
        assert 0 < resident_bytes(setup.region) - before < 5 << 20


def test_a_ring_takes_all_its_blocks_and_frees_the_lowest_first() -> None:
    """One process is both ranks: nothing here may wait."""
    fd = create_region(2, blocks=(130, 2), block_bytes=(64, 64))
    first, second = SharedMemoryTransport(fd, 0, 2), SharedMemoryTransport(fd, 1, 2)
    os.close(fd)
    for start in range(0, 300, 7):
        for i in range(start, start + 130):
            first.send(torch.tensor([i]), 1, 0)
        for i in range(start, start + 130):
            assert second.receive(torch.tensor([0]), 0, 0).item() == i
    first.close()
    second.close()
    second.close()


def test_counters_are_wider_than_any_buffer_of_theirs() -> None:
    """Slots and blocks are used thousands of times over, by groups of both orders in turn."""

    def body(transport: Transport, rank: int) -> None:
        x = torch.empty(20)
        for i in range(5_000):
            members = (0, 1) if i % 3 else (1, 0)
            total = transport.all_reduce(x.fill_(float(i + rank)), members)
            assert total[19].item() == 2.0 * i + 1.0

    with Setup("shm", 2) as setup:
        run_ranks(setup, body)


def test_what_is_not_a_region_is_refused(tmp_path: Path) -> None:
    fd = create_region(2)
    with pytest.raises(ConfigError, match="rank 0 cannot map the shared region: it is not a region for 3"):
        SharedMemoryTransport(fd, 0, 3)
    os.close(fd)
    path = tmp_path / "zeros"
    path.write_bytes(bytes(100_000))
    with path.open("rb+") as file, pytest.raises(ConfigError, match="not a region for 2 ranks"):
        SharedMemoryTransport(file.fileno(), 0, 2)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/box\n", {"box/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/box\n", {"box/cpu.max": "max 100000\n"}, float("inf")),
        (
            "3:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "1000\n", "cpu/a/cpu.cfs_period_us": "4000\n"},
            0.25,
        ),
        (
            "3:cpu:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "4000\n"},
            float("inf"),
        ),
        ("", {}, float("inf")),
    ],
)
def test_cpu_quota(tmp_path: Path, groups: str, files: dict[str, str], quota: float) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path / "groups", tmp_path) == quota


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESAW_NATIVE", "0")
    assert shared_memory.native_library() is None
    with pytest.raises(ConfigError, match="use 'gloo' or 'auto'"):
        create_region(2)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_size_of_a_region_is_what_a_preflight_counts_with(world: int) -> None:
    """Its file, and what of it is touched at once, against `transport.region`."""
    fd = create_region(world)
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    assert region_bytes(world) < size < 1.01 * region_bytes(world)
