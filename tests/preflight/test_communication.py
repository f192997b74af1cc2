"""The check of communication: faults are detected, named and fallen back from; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.node import Place
from seesaw.preflight import communication
from seesaw.preflight.communication import Leader, LeaderLostError, explain, find_connection
from seesaw.preflight.exercise import summed_period
from seesaw.preflight.messages import Check, Step
from seesaw.preflight.program import LARGE, MIDDLE, SMALL

ALL = (0, 1)
STEPS = [
    Step("barrier", ALL, 8),
    *(
        step
        for size in (SMALL, SMALL, MIDDLE, LARGE)
        for step in (
            Step("all_reduce", ALL, size),
            Step("gather", ALL, size),
            Step("broadcast", ALL, size),
            Step("send", (0, 1), size, 0),
            Step("send", (1, 0), size, 1),
        )
    ),
    Step("barrier", ALL, 8),
]
FAULTS = "tests.preflight.faults:"


def check(transport: str, fault: str = "", *, limit: float = 60.0, rendezvous: Path | str = "") -> Check:
    return Check(
        transport=transport,
        places=[Place(address="127.0.0.1")] * 2,
        dtype="bfloat16",
        steps=STEPS,
        limit=limit,
        rendezvous=str(rendezvous),
        wrapper=fault and FAULTS + fault,
    )


@pytest.fixture(scope="module")
def shared_leader() -> Iterator[Leader]:
    """One for all attempts, so that torch is loaded once: an attempt leaves nothing to the next."""
    leader = Leader()
    yield leader
    leader.close()


@pytest.fixture
def lent(shared_leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `find_connection` use the shared leader, and leave it running."""

    class Lent:
        attempt = staticmethod(shared_leader.attempt)

        def close(self) -> None:
            pass

    monkeypatch.setattr(communication, "Leader", Lent)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo"])
def test_a_working_transport_passes(shared_leader: Leader, transport: str, tmp_path: Path) -> None:
    assert shared_leader.attempt(check(transport, rendezvous=tmp_path)).problem is None
    assert psutil.Process(shared_leader.pid).children() == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("corrupt_shm", "all_reduce of 1 MiB among ranks 0, 1 gave wrong data at byte 128 (seen by rank 1)"),
        (
            "raise_shm",
            "rank 0 raised ConnectionError: the link is down during message of 1 MiB from rank 0 to rank 1",
        ),
        ("die_shm", "rank 1 was killed by SIGKILL during broadcast of 64 bytes among ranks 0, 1"),
        ("leave_shm", "rank 1 ended with exit code 7 during all_reduce of 64 bytes among ranks 0, 1"),
        ("stale_shm", "message of 64 bytes from rank 0 to rank 1 gave wrong data at byte 0 (seen by rank 1)"),
        (
            "mix_shm",
            "gather of 64 bytes among ranks 0, 1 gave wrong data of rank 0 at byte 0 (seen by rank 0)",
        ),
    ],
)
def test_faults_are_named(shared_leader: Leader, fault: str, said: str) -> None:
    attempt = check("shm", fault)
    problem = shared_leader.attempt(attempt).problem
    assert problem is not None
    assert explain(problem, attempt) == said
    assert psutil.Process(shared_leader.pid).children() == []


def test_a_hang_ends_in_time_and_names_the_operation(shared_leader: Leader) -> None:
    attempt = check("shm", "hang_shm", limit=3.0)
    problem = shared_leader.attempt(attempt).problem
    assert problem is not None
    assert explain(problem, attempt) == (
        "gather of 64 bytes among ranks 0, 1 did not end within 3 s (ranks 0, 1 stood there)"
    )
    assert psutil.Process(shared_leader.pid).children() == []


def test_a_dead_rank_is_the_cause_of_its_peers_errors(shared_leader: Leader, tmp_path: Path) -> None:
    """Over sockets the death of rank 1 breaks the connection of rank 0, which says so first."""
    attempt = check("tcp", "die_tcp", rendezvous=tmp_path)
    problem = shared_leader.attempt(attempt).problem
    assert problem is not None
    assert explain(problem, attempt).startswith("rank 1 was killed by SIGKILL during broadcast")


@pytest.mark.usefixtures("lent")
def test_the_next_transport_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="seesaw"):
        found = find_connection(STEPS, [Place(), Place()], wrapper=FAULTS + "corrupt_native", limit=60.0)
    assert found.transport == "gloo"
    assert found.places == (Place(), Place())
    wrong = "all_reduce of 1 MiB among ranks 0, 1 gave wrong data at byte 128 (seen by rank 1)"
    assert [record.getMessage() for record in caplog.records][:2] == [
        f"preflight: transport 'shm' failed: {wrong}; going on with 'tcp'",
        f"preflight: transport 'tcp' failed: {wrong}; going on with 'gloo'",
    ]
    assert "2 ranks exchange data correctly over 'gloo'" in caplog.text


@pytest.mark.usefixtures("lent")
def test_gpus_that_do_not_reach_each_other_keep_nccl_without(caplog: pytest.LogCaptureFixture) -> None:
    """NCCL's class, with Gloo in its place: a hang ends in time, is explained, and the next way is taken."""
    with caplog.at_level("INFO", logger="seesaw"):
        found = find_connection(
            STEPS, [Place(), Place()], own="nccl", wrapper=FAULTS + "no_peers", dtype="bfloat16", limit=4.0
        )
    assert found.transport == "nccl-no-p2p"
    assert found.failures == (
        "transport 'nccl' failed: message of 64 bytes from rank 0 to rank 1 did not end within 4 s (rank 1 stood "
        "there); often GPUs do not reach each other's memory although the driver says that they do: switch the IOMMU "
        "off or boot with iommu=pt, and switch ACS off on PCIe bridges; NCCL_P2P_DISABLE=1 keeps NCCL without it, "
        "slower",
    )
    assert f"preflight: {found.failures[0]}; going on with 'nccl-no-p2p'" in caplog.messages


@pytest.mark.usefixtures("lent")
def test_no_nccl_at_all_goes_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a variable that says already what would be tried next saves the try."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    found = find_connection(STEPS, [Place(), Place()], own="nccl", wrapper=FAULTS + "no_nccl", limit=3.0)
    assert found.transport == "shm" and len(found.failures) == 1


@pytest.mark.usefixtures("lent")
def test_slow_links_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(communication, "SLOW_LINK", 1e15)
    found = find_connection(STEPS, [Place(), Place()], own="nccl", transport="nccl", limit=60.0)
    assert found.transport == "nccl"
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned.startswith("preflight: GPUs exchange data much slower than over PCIe of 16 lanes: ")
    for part in ("ranks 0, 1 at ", "rank 0 to 1 at ", "rank 1 to 0 at ", "GB/s", "nvidia-smi topo -m"):
        assert part in warned


def test_links_as_fast_as_pcie_are_not_named() -> None:
    steps = [Step("send", (number, number + 1), 1 << 24, timed=True) for number in range(6)]
    assert communication.slow_links(steps, dict.fromkeys(range(6), 6e9)) == []
    (finding,) = communication.slow_links(steps, {number: (number + 1) * 1e8 for number in range(6)})
    assert "rank 0 to 1 at 0.1 GB/s; rank 1 to 2 at 0.2 GB/s" in finding.what
    assert finding.what.endswith("rank 3 to 4 at 0.4 GB/s, and 2 more")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 64])
def test_sums_are_exact_however_they_are_rounded_on_the_way(ranks: int) -> None:
    """NCCL rounds a sum of bfloat16 at every rank that it passes."""
    period = summed_period(ranks)
    assert ranks * (period - 1) <= 256 and period >= 2
    assert all(period % i for i in range(2, period))


def test_a_leader_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed in the first attempt; the second, over sockets, has another, and ranks get addresses."""
    real = Leader.attempt

    def attempt(self: Leader, check: Check) -> communication.Verdict:
        if check.transport == "shm":
            os.kill(self.pid, signal.SIGKILL)
        return real(self, check)

    monkeypatch.setattr(Leader, "attempt", attempt)
    found = find_connection(STEPS, [Place(), Place(cores=[0])], limit=60.0)
    assert found.transport == "tcp"
    assert found.places == (Place(address="127.0.0.1"), Place(address="127.0.0.1", cores=[0]))
    assert found.failures == ("transport 'shm' failed: the checking process ended",)


@pytest.mark.usefixtures("lent")
def test_no_transport_is_an_error() -> None:
    place = Place(cgroups=["/nonesuch/group"])
    with pytest.raises(ConfigError) as raised:
        find_connection(
            STEPS, [Place(), Place()], transport="shm", wrapper=FAULTS + "corrupt_all", limit=60.0
        )
    assert str(raised.value) == (
        "preflight: no transport connects the 2 ranks: transport 'shm' failed: all_reduce of 1 MiB among ranks 0, 1 "
        "gave wrong data at byte 128 (seen by rank 1); transport 'auto' tries others"
    )
    with pytest.raises(
        ConfigError, match=r"preflight: rank 1 cannot join the control group /nonesuch/group: No such"
    ):
        find_connection(STEPS, [Place(), place], limit=60.0)


def test_a_leader_that_stands_still_is_given_up(
    shared_leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(communication, "GRACE_SECONDS", 0.1)
    assert shared_leader.attempt(check("shm")).problem is None
    os.kill(shared_leader.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LeaderLostError, match=r"did not answer within 0\.2 s"):
            shared_leader.attempt(check("shm", limit=0.1))
    finally:
        shared_leader.close()  # the last test to use it
    assert not psutil.pid_exists(shared_leader.pid)


CONTROL = """
import sys
from seesaw.preflight.communication import Attempts, meeting
from tests.preflight.test_communication import check
try:
    with Attempts() as attempts, meeting("tcp") as rendezvous:
        attempts.run(check("tcp", "hang_tcp", limit=600.0, rendezvous=rendezvous))
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_nothing_is_left_when_the_control_process_ends(number: signal.Signals, tmp_path: Path) -> None:
    """In the middle of a hang, with ranks that have met in a directory."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    control = subprocess.Popen([sys.executable, "-c", CONTROL], env=environment)
    try:
        process = psutil.Process(control.pid)
        assert until(lambda: len(process.children(recursive=True)) == 3)
        assert until(lambda: len(list(tmp_path.glob("seesaw-*/rank*"))) == 2)
        family = process.children(recursive=True)
        control.send_signal(number)
        assert control.wait(60) == (3 if number == signal.SIGINT else -number)
        assert until(lambda: not any(child.is_running() and child.status() != "zombie" for child in family))
        assert until(lambda: not list(tmp_path.iterdir()))
    finally:
        control.kill()
        control.wait()


def test_a_leader_started_early_is_used_or_ended() -> None:
    communication.start_early()
    communication.start_early()
    assert len(communication._early) == 1
    pid = communication._early[0].pid
    communication.discard_early()
    assert not psutil.pid_exists(pid) and not communication._early


def test_starting_early_does_not_wait_for_torch() -> None:
    code = "import sys, seesaw.preflight.gate, seesaw.execution.fork_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
