"""Real rigs: what limits them, and that nothing stays behind however they end. Skipped where there is no root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.rig import Rig, RigError
from benchmarks.rig.cgroups import find_hierarchy
from benchmarks.rig.probe import rank_probes, round_trip, throughput
from benchmarks.rig.processes import start_time
from benchmarks.rig.rig import check_machine
from seesaw.core.node import Node, load_node

ROOT = Path(__file__).parents[2]
GROUPS = find_hierarchy()


def why_not() -> str | None:
    try:
        check_machine()
    except RigError as error:
        return str(error)
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000))"
    allowed = subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    return None if allowed else "network namespaces cannot be made here"


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
needs_groups = pytest.mark.skipif(
    GROUPS is None or not os.access(GROUPS.root, os.W_OK), reason="no writable `cpu` control groups here"
)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@dataclass
class Traces:
    """What a rig would leave behind, noted while it is up."""

    processes: dict[int, int | None]
    """Process ids, and when each started."""
    groups: list[Path]

    @classmethod
    def of(cls, node_file: str, *others: int) -> Traces:
        node, keeper = load_node(node_file), int(node_file.split("/")[2])
        groups = [Path(group) for place in node.ranks for group in place.cgroups]
        groups += [groups[0].parent, groups[0].parent / "command"] if groups else []
        return cls({pid: start_time(pid) for pid in (keeper, *others)}, groups)

    def gone(self) -> bool:
        """The namespaces hang on the keeper and on the processes in them."""
        ended = all(start_time(pid) != started for pid, started in self.processes.items())
        return ended and not any(group.exists() for group in self.groups)


@contextmanager
def running(script: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], Traces]]:
    """`rig run` on a shell script that first starts `sleep 600 &`; what it leaves would be its traces."""
    script = f"setsid sleep 600 & echo $SEESAW_NODE $$ $!; read _; {script}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.rig", "run", *options, "--", "sh", "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        node_file, *pids = process.stdout.readline().split()
        traces = Traces.of(node_file, *map(int, pids))
        process.stdin.write("\n")  # all is noted: go on
        process.stdin.flush()
        yield process, traces
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def slow_rig() -> Iterator[Rig]:
    quota = 0.5 if GROUPS is not None and os.access(GROUPS.root, os.W_OK) else "none"
    with Rig(ranks=2, link="100mbit", quota=quota) as rig:
        yield rig


def test_a_link_is_no_faster_than_its_rate(slow_rig: Rig) -> None:
    size, rate = 1 << 18, 100e6
    with rank_probes(slow_rig.node) as probes:
        assert throughput(probes[0], probes[1], seconds=0.1) > 0
        median, _ = round_trip(probes[1], probes[0], size, count=6)
    assert 2 * 8 * size / median <= 1.3 * rate  # a busy machine makes it slower, never faster


@needs_groups
def test_the_quota_is_in_the_control_groups(slow_rig: Rig) -> None:
    assert GROUPS is not None
    for place in slow_rig.node.ranks:
        (group,) = map(Path, place.cgroups)
        if GROUPS.version == 1:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (group / "cpu.max").read_text().split()
        assert (int(quota), int(period)) == (2000, 4000)


def test_processes_enter_their_places(slow_rig: Rig) -> None:
    node = slow_rig.node
    assert len({place.address for place in node.ranks}) == 2
    with rank_probes(node) as probes:
        for place, probe in zip(node.ranks, probes, strict=True):
            probe.call("listen")
            pid = probe.pid
            assert place.netns is not None
            assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(place.netns).st_ino
            assert os.sched_getaffinity(pid) == set(place.cores)
            for group in place.cgroups:
                assert str(pid) in Path(group, "cgroup.procs").read_text().split()


def test_connections_do_not_follow_the_hosts_choice_of_congestion_control(slow_rig: Rig) -> None:
    read = (
        "import sys; from seesaw.core.node import Place; from seesaw.execution.placement import enter;"
        "enter(Place(netns=sys.argv[1])); print(open('/proc/sys/net/ipv4/tcp_congestion_control').read())"
    )
    for place in slow_rig.node.ranks:
        assert place.netns is not None
        said = subprocess.run(
            [sys.executable, "-c", read, place.netns], capture_output=True, text=True, check=True
        )
        assert said.stdout.strip() in ("cubic", "reno")


def test_the_command_runs_outside_with_the_node_file() -> None:
    with running("readlink /proc/self/ns/net; exit 7", "--ranks", "2") as (process, traces):
        assert process.stdout is not None
        assert process.stdout.readline().strip() == os.readlink("/proc/self/ns/net")
        assert process.wait(timeout=30) == 7
        assert until(traces.gone)


@needs_groups
def test_sigkill_of_the_rig_leaves_nothing() -> None:
    with running("sleep 600", "--ranks", "4", "--quota", "0.25") as (process, traces):
        assert not traces.gone()
        process.kill()
        assert until(traces.gone)


def test_sigkill_of_the_command_leaves_nothing() -> None:
    with running("kill -KILL $$", "--ranks", "2") as (process, traces):
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
        assert until(lambda: all(not group.exists() for group in traces.groups))


def test_control_c_ends_the_command_and_the_rig() -> None:
    with running("wait", "--ranks", "2") as (process, traces):
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
        assert until(lambda: all(not group.exists() for group in traces.groups))


def test_sigkill_of_the_keeper_is_cleared_away_by_its_owner() -> None:
    rig = Rig(ranks=2, link="none")
    traces = Traces.of(rig.node_file)
    os.kill(rig.keeper_pid, signal.SIGKILL)
    rig.close()
    assert until(traces.gone)


def test_up_stays_until_down() -> None:
    def rig(*arguments: str) -> str:
        argv = [sys.executable, "-m", "benchmarks.rig", *arguments]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout

    node_file = rig("up", "--ranks", "2").split()[1].removeprefix("SEESAW_NODE=")
    keeper = node_file.split("/")[2]
    try:
        traces = Traces.of(node_file)
        assert isinstance(load_node(node_file), Node)
        assert node_file in rig("status")
    finally:
        rig("down", keeper)
    assert until(traces.gone)
    assert node_file not in rig("status")


def test_without_root_it_says_so() -> None:
    code = "import sys; sys.path.insert(0, '.')\nfrom benchmarks.rig.cli import main\nimport os; os.setuid(65534)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['up']))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("rig: the rig needs root") and done.stderr.count("\n") == 1
