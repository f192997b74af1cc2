"""What a rig is asked to be, and the commands and files that follow from it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest

from benchmarks.rig import RigError, make_settings, parse_link
from benchmarks.rig.cgroups import Hierarchy, RigGroups, find_hierarchy, groups_of, remove_stale
from benchmarks.rig.keeper import tell_kernel
from benchmarks.rig.network import address, steps, sysctls
from benchmarks.rig.settings import Settings, deal_cores


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1gbit", 10**9),
        ("0.5Gbit/s", 5 * 10**8),
        ("500mbit", 5 * 10**8),
        ("2 Gbps", None),
        ("2 gbitps", 2 * 10**9),
        ("100000kbit", 10**8),
        ("none", "none"),
        ("", None),
        ("fast", None),
        ("1kbit", None),
        ("100gbit", None),
        ("-1gbit", None),
    ],
)
def test_link_rates(text: str, rate: int | str | None) -> None:
    if rate is None:
        with pytest.raises(RigError, match="link"):
            parse_link(text)
    else:
        assert parse_link(text) == (None if rate == "none" else rate)


@pytest.mark.parametrize(
    ("ranks", "cores", "dealt"),
    [
        (2, [0, 1], [[0], [1]]),
        (4, [0, 1], [[0], [1], [0], [1]]),
        (3, [4, 5], [[4], [5], [4]]),
        (2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
        (2, [0, 1, 2], [[0], [1]]),
    ],
)
def test_cores_are_dealt_in_turn(ranks: int, cores: list[int], dealt: list[list[int]]) -> None:
    assert deal_cores(ranks, cores) == dealt


def fixed(ranks: int, cores: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> Settings:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    return make_settings(ranks, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "quota"), [(2, None), (4, (2000, 4000)), (8, (1000, 4000)), (16, (1000, 8000))]
)
def test_ranks_that_share_a_core_share_its_time(
    ranks: int, quota: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fixed(ranks, 2, monkeypatch)
    assert (made.quota_us, made.period_us) == (quota or (None, 4000))


def test_a_quota_may_be_given_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fixed(2, 2, monkeypatch, quota=0.25).quota_us == 1000
    assert fixed(2, 2, monkeypatch, quota="0.5").quota_us == 2000
    assert fixed(8, 2, monkeypatch, quota="none").quota_us is None
    for wrong in ("half", 0, -1, "nan"):
        with pytest.raises(RigError, match="quota"):
            fixed(2, 2, monkeypatch, quota=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 0},
        {"ranks": 65},
        {"ranks": 2, "cores": [1 << 15]},
        {"ranks": 2, "cores": []},
        {"ranks": 2, "mtu": 100},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(RigError):
        make_settings(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("link", ["10mbit", "500mbit", "1gbit", "4gbit", "32gbit"])
def test_a_packet_fits_its_buckets(link: str) -> None:
    made = make_settings(2, link=link)
    assert made.mtu < made.at_once <= made.burst
    with pytest.raises(RigError, match="burst"):
        make_settings(2, link=link, burst=made.mtu)


def test_every_link_is_limited_in_both_directions() -> None:
    made = make_settings(3, link="1gbit", quota="none")
    limits = [step for step in steps(made, ["/a", "/b", "/c"]) if step.argv[0] == "tc"]
    ends = sorted((step.namespace, step.argv[step.argv.index("dev") + 1]) for step in limits)
    assert ends == [(-1, "port0"), (-1, "port1"), (-1, "port2"), (0, "eth0"), (1, "eth0"), (2, "eth0")]
    assert all(step.argv[step.argv.index("rate") + 1] == "1000000000bit" for step in limits)


def test_no_limit_needs_no_bucket() -> None:
    made = make_settings(2, quota="none")
    assert {step.argv[0] for step in steps(made, ["/a", "/b"])} == {"ip"}


def test_every_rank_knows_every_other() -> None:
    made = make_settings(4, quota="none")
    paths = [f"/ns{rank}" for rank in range(4)]
    inside = [step.stdin for step in steps(made, paths) if step.namespace >= 0]
    assert len(inside) == 4
    for rank, batch in enumerate(inside):
        for other in range(4):
            assert (f"neigh add {address(other)} " in batch) == (other != rank)
        assert ipaddress.ip_address(address(rank)) in ipaddress.ip_network("10.77.0.0/24")
    hub = "".join(step.stdin for step in steps(made, paths) if step.namespace < 0)
    assert all(f"netns {path}\n" in hub for path in paths)


def test_windows_are_bounded_in_the_namespaces_of_ranks_only() -> None:
    assert "ipv4/tcp_rmem" in sysctls(0)
    assert "ipv4/tcp_rmem" not in sysctls(-1)


def test_a_setting_that_the_kernel_refuses_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def write(path: Path, value: str) -> None:
        tried.append(value)
        if value == "cubic":
            raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", write)
    tell_kernel(Path("/proc/sys/net/ipv4/tcp_congestion_control"), ("cubic", "reno", "vegas"))
    tell_kernel(Path("/proc/sys/net/of/no/kernel"), ("cubic",))
    assert tried == ["cubic", "reno", "cubic"]


def test_the_hierarchy_with_the_cpu_controller_is_found(tmp_path: Path) -> None:
    unified = tmp_path / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("cpuset cpu io\n")
    first = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n"
    other = "cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0\n"
    second = f"cgroup2 {unified} cgroup2 rw,nosuid 0 0\n"
    assert find_hierarchy(other + first) == Hierarchy(Path("/sys/fs/cgroup/cpu,cpuacct"), 1)
    assert find_hierarchy(other + second) == Hierarchy(unified, 2)
    assert find_hierarchy(other) is None
    (unified / "cgroup.controllers").write_text("cpuset io\n")
    assert find_hierarchy(second) is None


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (1, {"cpu.cfs_quota_us": "2000", "cpu.cfs_period_us": "4000"}),
        (2, {"cpu.max": "2000 4000"}),
    ],
)
def test_quotas_in_both_versions(version: int, files: dict[str, str], tmp_path: Path) -> None:
    groups = groups_of(Hierarchy(tmp_path, version), os.getpid())
    groups.create(make_settings(2, quota=0.5))
    for rank in range(2):
        assert {path.name: path.read_text() for path in groups.rank(rank).iterdir()} == files
    assert list(groups.command.iterdir()) == []


def test_groups_are_stale_once_their_keeper_has_ended(tmp_path: Path) -> None:
    hierarchy = Hierarchy(tmp_path, 1)
    ours = groups_of(hierarchy, os.getpid())
    namespace = ours.root.name.split("-")[2]
    later = RigGroups(
        hierarchy, tmp_path / f"seesaw-rig-{namespace}-{os.getpid()}-1"
    )  # the number used again
    elsewhere = RigGroups(hierarchy, tmp_path / "seesaw-rig-1-999999999-1")
    for groups in (ours, later, elsewhere):
        groups.rank(0).mkdir(parents=True)
    (tmp_path / "seesaw-rig-notes").mkdir()
    assert remove_stale(hierarchy) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [ours.root.name, elsewhere.root.name, "seesaw-rig-notes"]
    )
