"""Limits of the machine, with injected values and files; the probes for real."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.devices import CPU, CUDA
from seesaw.core.node import Place
from seesaw.preflight import limits
from seesaw.preflight.findings import Finding
from seesaw.preflight.limits import Needs, check_limits, probe
from seesaw.preflight.system import GroupLimit, Machine, available_memory, group_limit, read_machine

GIB = 1 << 30
NEEDS = Needs(
    host_buffer=4 * GIB, fixed=(2 * GIB, 3 * GIB), pools=(GIB, GIB), shared_weights=0, mapped=5 * GIB
)
AMPLE = Machine(available=64 * GIB, limits={"-v": None, "-l": 8 << 20, "-n": 1024, "-f": None})


def only(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


def test_an_ample_machine_has_nothing_against_it() -> None:
    assert check_limits(replace(NEEDS, host_buffer=1 << 20, pools=(0, 0)), [Place()] * 2, machine=AMPLE) == []


def test_free_memory() -> None:
    assert limits.memory(NEEDS, replace(AMPLE, available=12 * GIB)) is None
    some = only(limits.memory(NEEDS, replace(AMPLE, available=10 * GIB)))
    assert some.severity == "warning"
    assert str(some) == (
        "memory: the plan takes up to 11.0 GiB (5.00 GiB for weights and workspaces, 2.00 GiB for device KV, "
        "4.00 GiB for the host buffer), and 10.0 GiB of memory are free, so a rank may be killed as buffers fill; "
        "lower --device-memory or --host-kv"
    )
    little = only(limits.memory(NEEDS, replace(AMPLE, available=4 * GIB)))
    assert little.severity == "error" and "take 5.00 GiB, and 4.00 GiB of memory are free" in little.what


def test_the_control_group_counts_where_it_is_tighter() -> None:
    group = GroupLimit("/g", 8 * GIB, 6 * GIB)
    finding = only(limits.memory(NEEDS, replace(AMPLE, group=group)))
    assert finding.severity == "warning"
    assert "6.00 GiB are left of the control group's limit of 8.00 GiB" in finding.what
    assert limits.memory(NEEDS, replace(AMPLE, group=replace(group, room=20 * GIB))) is None


def test_memory_that_must_be_backed() -> None:
    strict = replace(AMPLE, overcommit=2, commit_room=6 * GIB)
    finding = only(limits.committed(NEEDS, strict))
    assert finding.severity == "error" and "reserve 7.00 GiB" in finding.what
    assert "vm.overcommit_memory=0" in finding.remedy
    assert limits.committed(NEEDS, replace(strict, overcommit=0)) is None
    assert limits.committed(NEEDS, replace(strict, commit_room=7 * GIB)) is None


@pytest.mark.parametrize(
    ("check", "option", "bad", "good", "said"),
    [
        (limits.address_space, "-v", 4 * GIB, 100 * GIB, "ulimit -v allows 4.00 GiB"),
        (
            limits.file_size,
            "-f",
            GIB,
            4 * GIB,
            "shared memory of 4.00 GiB is needed, and ulimit -f allows 1.00 GiB",
        ),
        (limits.open_files, "-n", 64, 256, "2 ranks need up to 176 descriptors, and ulimit -n allows 64"),
    ],
)
def test_limits_of_a_process(check: object, option: str, bad: int, good: int, said: str) -> None:
    assert callable(check)
    finding = only(check(NEEDS, replace(AMPLE, limits={option: bad})))
    assert finding.severity == "error" and said in finding.what
    assert f"`ulimit {option}" in finding.remedy
    for ample in (good, None):
        assert check(NEEDS, replace(AMPLE, limits={option: ample})) is None


def test_locked_memory_matters_only_to_devices() -> None:
    assert limits.locked_memory(NEEDS, AMPLE, CPU) is None
    finding = only(limits.locked_memory(NEEDS, AMPLE, CUDA))
    assert finding.severity == "warning"
    assert "9.00 GiB, are to be locked" in finding.what and "ulimit -l allows 8.00 MiB" in finding.what
    assert "ulimit -l unlimited" in finding.remedy
    assert limits.locked_memory(NEEDS, replace(AMPLE, limits={"-l": None}), CUDA) is None


def test_control_groups_of_ranks(tmp_path: Path) -> None:
    group = tmp_path / "rank1"
    group.mkdir()
    (group / "memory.max").write_text(f"{3 * GIB + 5}\n")
    (group / "memory.current").write_text("5\n")
    places = [Place(cgroups=[str(tmp_path)]), Place(cgroups=[str(group)])]
    finding = list(limits.rank_groups(NEEDS, places))
    assert [f.severity for f in finding] == ["warning"]
    assert f"rank 1 takes up to 4.00 GiB, and its control group {group} leaves 3.00 GiB" in finding[0].what
    (group / "memory.max").write_text(f"{2 * GIB}\n")
    assert [f.severity for f in limits.rank_groups(NEEDS, places)] == ["error"]
    (group / "memory.max").write_text("max\n")
    assert list(limits.rank_groups(NEEDS, places)) == []


# ---- what the machine says ---------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_tightest_group_of_version_2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/job\n",
            "proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    2048 kB\nCommitLimit: 10 kB\nCommitted_AS: 4 kB\n",
            "proc/sys/vm/overcommit_memory": "2\n",
            "sys/fs/cgroup/user/memory.max": "5000\n",
            "sys/fs/cgroup/user/memory.current": "4000\n",
            "sys/fs/cgroup/user/memory.stat": "anon 100\ninactive_file 1500\n",
            "sys/fs/cgroup/user/job/memory.max": "9000\n",
            "sys/fs/cgroup/user/job/memory.current": "1000\n",
        },
    )
    machine = read_machine(root)
    assert machine.group == GroupLimit(str(root / "sys/fs/cgroup/user"), 5000, 2500)
    assert (machine.available, machine.overcommit, machine.commit_room) == (2048 << 10, 2, 6 << 10)


def test_version_1_in_a_container(tmp_path: Path) -> None:
    """The path is the host's and cannot be seen; the mount itself is the container's group."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
        },
    )
    assert group_limit(root) == GroupLimit(str(root / "sys/fs/cgroup/memory"), 7000, 4500)
    write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert group_limit(root) is None


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert machine.group is None and machine.commit_room is None and machine.overcommit == 0
    assert machine.available > 0


def test_this_machine() -> None:
    machine = read_machine()
    assert machine.limits["-n"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < available_memory() <= machine.available * 1.5


# ---- probes ------------------------------------------------------------------------------------------------


def test_probes_say_what_the_system_refuses() -> None:
    def refuse(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    found = probe(NEEDS, shared=refuse, private=refuse)
    assert [str(finding) for finding in found] == [
        "memory: 4.00 GiB for the host buffer cannot be reserved (Cannot allocate memory); lower --host-kv",
        "memory: 4.00 GiB for a rank's memory cannot be reserved (Cannot allocate memory); lower --device-memory",
    ]
    small = Needs(host_buffer=1 << 20, fixed=(1 << 20,), pools=(0,), shared_weights=0, mapped=0)
    assert probe(small) == [] and probe(replace(small, host_buffer=0, fixed=(0,))) == []


def test_a_real_limit_is_seen() -> None:
    """In a process of its own, whose address space and file size are limited."""
    code = """
import resource, signal
from seesaw.preflight.limits import Needs, check_limits, probe
from seesaw.core.node import Place
GIB = 1 << 30
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
needs = Needs(host_buffer=GIB, fixed=(2 * GIB,), pools=(0,), shared_weights=0, mapped=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (GIB // 2, GIB // 2))
resource.setrlimit(resource.RLIMIT_AS, (3 * GIB // 2, 3 * GIB // 2))
said = " | ".join(map(str, probe(needs)))
assert "1.00 GiB for the host buffer cannot be reserved (File too large)" in said, said
assert "2.00 GiB for a rank's memory cannot be reserved (Cannot allocate memory)" in said, said
said = " | ".join(map(str, check_limits(needs, [Place()])))
assert "ulimit -v allows 1.50 GiB" in said and "ulimit -f allows 512.0 MiB" in said, said
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_what_ranks_hold_on_devices_is_no_memory_of_the_host() -> None:
    small = replace(AMPLE, available=NEEDS.host_buffer + GIB, limits={})
    assert any("memory" in f.what for f in limits.check_limits(NEEDS, [], machine=small))
    assert not any(f.severity == "error" for f in limits.check_limits(NEEDS, [], device=CUDA, machine=small))
