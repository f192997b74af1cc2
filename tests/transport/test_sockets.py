"""What is particular to connections: setting them up, and losing them."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesaw.core.errors import ConfigError, StartupError
from seesaw.transport.base import Transport
from seesaw.transport.meeting import Meeting
from seesaw.transport.sockets import SocketTransport
from tests.transport.ranks import Setup, run_ranks

LOCAL = "127.0.0.1"


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"rank 0 has no connection to rank 1 of 2 after 0\.2 s"):
        SocketTransport(0, 2, tmp_path, LOCAL, timeout=0.2)


def test_a_rank_that_waits_for_lower_ones_names_them(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"rank 3 has no connection to ranks 0, 1, 2 of 4 after 0\.2 s"):
        SocketTransport(3, 4, tmp_path, LOCAL, timeout=0.2)


def test_one_absent_rank_of_three_is_named_by_both_others(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        both = [threads.submit(SocketTransport, rank, 3, tmp_path, LOCAL, timeout=1.0) for rank in (0, 2)]
        for rank, future in zip((0, 2), both, strict=True):
            with pytest.raises(StartupError, match=f"rank {rank} has no connection to rank 1 of 3"):
                future.result()


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"rank 0 cannot listen on address 192\.0\.2\.1"):
        SocketTransport(0, 2, tmp_path, "192.0.2.1", timeout=1.0)


def test_a_rank_that_ended_is_named_by_those_that_reach_for_it(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        SocketTransport(0, 2, tmp_path, LOCAL, timeout=0.1)
    with pytest.raises(StartupError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1:\d+: "):
        SocketTransport(1, 2, tmp_path, LOCAL, timeout=5.0)


def test_strangers_are_turned_away_and_do_not_hold_up(tmp_path: Path) -> None:
    """One sends a wrong token, one nothing, one hangs up at once."""
    with ThreadPoolExecutor() as threads:
        first = threads.submit(SocketTransport, 0, 2, tmp_path, LOCAL, timeout=20.0)
        while not (tmp_path / "rank0").exists():
            assert not first.done()
            time.sleep(0.005)
        host, port = (tmp_path / "rank0").read_text().split()
        liar, silent, gone = (socket.create_connection((host, int(port))) for _ in range(3))
        liar.sendall(bytes(40))
        gone.close()
        assert liar.recv(1) == b"", "a connection with a wrong token was kept"
        second = SocketTransport(1, 2, tmp_path, LOCAL, timeout=20.0)
        transport = first.result()
        transport.send(torch.tensor([5]), 1, 0)
        assert second.receive(torch.tensor([0]), 0, 0).item() == 5
        for end in (liar, silent, transport, second):
            end.close()


def test_a_rank_connects_only_once(tmp_path: Path) -> None:
    """A second connection for a link that exists is dropped, even with the token."""
    meetings = [Meeting(rank, 2, 1, tmp_path, 20.0) for rank in (0, 1)]
    with ThreadPoolExecutor() as threads:
        for future in [threads.submit(meeting.connect_all, LOCAL) for meeting in meetings]:
            future.result()
    assert set(meetings[0].connections) == {(1, 0)} and set(meetings[1].connections) == {(0, 0)}
    ours, theirs = meetings[0].connections[1, 0], meetings[1].connections[0, 0]
    assert ours.getsockname() == theirs.getpeername()
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    for meeting in meetings:
        meeting.close()
        assert not meeting.connections


def test_a_lost_peer_raises_with_its_rank() -> None:
    """Rank 1 dies; whatever needs it afterwards raises, and rank 2 can still be talked to."""
    members = (0, 1, 2)

    def never_ending(transport: Transport) -> Callable[[], None]:
        def send() -> None:
            while True:
                transport.send(torch.zeros(100_000), 1, 0)

        return send

    def body(transport: Transport, rank: int) -> None:
        x = torch.zeros(1000)
        if rank == 1:
            transport.send(x + 7, 0, 1)
            transport.flush()
            transport.close()
            with pytest.raises(AssertionError, match="closed"):
                transport.flush()
            return
        if rank == 0:
            assert torch.equal(transport.receive(x.clone(), 1, 1), x + 7)  # it was on its way already
            attempts: list[Callable[[], object]] = [
                lambda: transport.receive(x, 1, 0),
                lambda: transport.receive(x, 1, 1),
                lambda: transport.all_reduce(x, members),
                lambda: transport.gather(x, members),
                lambda: transport.broadcast(x, (1, 0)),
                never_ending(transport),
            ]
            for attempt in attempts:
                with pytest.raises(ConnectionError, match="rank 0 lost rank 1 during"):
                    attempt()
        other = 2 - rank
        transport.send(x + rank, other, 0)
        assert torch.equal(transport.receive(x, other, 0), torch.full((1000,), float(other)))

    with Setup("tcp", 3) as setup:
        run_ranks(setup, body, flush=False)


def test_what_nobody_receives_is_read_ahead_up_to_the_limit() -> None:
    """Receiver and sender each keep 30,000 bytes; the rest waits, and everything arrives in order."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as threads:
        ends = [
            threads.submit(SocketTransport, rank, 2, directory, LOCAL, timeout=20.0, buffer_bytes=30_000)
            for rank in (0, 1)
        ]
        first, second = (end.result() for end in ends)
        x = torch.arange(4_000_000)
        sending = threads.submit(lambda: [first.send(x + i, 1, 0) for i in range(3)])
        first_too: Tensor = second.receive(torch.empty_like(x), 0, 0)
        assert torch.equal(first_too, x)
        for i in (1, 2):
            assert torch.equal(second.receive(torch.empty_like(x), 0, 0), x + i)
        sending.result()
        first.flush()
        first.close()
        second.close()
        second.close()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Descriptors and threads are gone after `close`, and after a failed start."""
    descriptors, threads_before = len(os.listdir("/proc/self/fd")), native_threads()
    with pytest.raises(StartupError):
        SocketTransport(1, 3, tmp_path, LOCAL, timeout=0.1)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as threads:
        ends = [threads.submit(SocketTransport, rank, 3, directory, LOCAL, timeout=20.0) for rank in range(3)]
        for end in ends:
            end.result().close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    while native_threads() > threads_before:  # a thread that was joined may show for a moment longer
        time.sleep(0.005)


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_without_the_native_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESAW_NATIVE", "0")
    with pytest.raises(ConfigError, match="needs the native library"):
        SocketTransport(0, 2, tmp_path, LOCAL, timeout=1.0)
