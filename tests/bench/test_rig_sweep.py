"""The joined table of a sweep over link speeds, from made-up results."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import rig_sweep


def contestant(
    name: str, rates: list[float], error: str | None = None, kind: str = "seesaw"
) -> dict[str, Any]:
    middle = sorted(rates)[len(rates) // 2] if rates else None
    return {
        "name": name,
        "kind": kind,
        "options": {"plan": name.partition("@")[0]},
        "error": error,
        "runs": [{"tokens_per_second": rate} for rate in rates],
        "median_tokens_per_second": middle,
        "median_seconds": None if middle is None else 1000 / middle,
        "floor": None if middle is None else {"seconds": 1.0},
    }


def result(*contestants: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": "tiny",
        "date": "2026-01-02",
        "machine": {"processor": "p"},
        "versions": {"seesaw": "1"},
        "options": {"rounds": 3},
        "workloads": [{"name": "short", "contestants": list(contestants)}],
    }


def test_the_best_static_plan_of_each_speed_is_marked() -> None:
    found = {
        "1gbit": result(
            contestant("P2->T2", [120.0, 130.0, 140.0]),
            contestant("T2", [90.0, 100.0, 110.0]),
            contestant("T2->T2", [80.0]),
            contestant("P2@chunk=512", [], error="out of luck"),
        ),
        "4gbit": result(
            contestant("P2->T2", [120.0]),
            contestant("T2", [100.0]),
            contestant("T2->T2", [150.0]),
            contestant("P2@chunk=512", [90.0]),
        ),
    }
    args = argparse.Namespace(ranks=2, quota="auto", record="sweep")
    lines = rig_sweep.report(args, found).splitlines()
    for line in (
        "# sweep: tiny on 2 ranks, 2026-01-02",
        "| contestant | 1gbit | 4gbit |",
        "| P2->T2 | 130 (120 to 140) | 120 (120 to 120) |",
        "| T2 | 100* (90 to 110) | 100 (100 to 100) |",
        "| T2->T2 | 80 (80 to 80) | 150* (150 to 150) |",
        "| P2@chunk=512 | failed | 90 (90 to 90) |",
        "| best re-sharded over best static | **1.30** | **0.80** |",
        "| share of its floor: best re-sharded, best static | 13%, 10% | 12%, 15% |",
        "- 1gbit: P2@chunk=512: out of luck",
    ):
        assert line in lines


def test_a_speed_without_a_static_plan_has_no_ratio() -> None:
    found = {"none": result(contestant("P2->T2", [100.0]), contestant("vllm:TP1", [500.0], kind="vllm"))}
    found["none"]["workloads"][0]["contestants"][1]["options"] = {"layout": "TP1"}
    lines = rig_sweep.speeds(found, 0)
    assert "| best re-sharded over best static | – |" in lines


def test_without_floors_there_is_no_row_of_them() -> None:
    found = {"none": result(contestant("P2->T2", [100.0]))}
    assert any("share of its floor" in line for line in rig_sweep.speeds(found, 0))
    found["none"]["workloads"][0]["contestants"][0]["floor"] = None
    assert not any("share of its floor" in line for line in rig_sweep.speeds(found, 0))


def test_what_the_planner_took_is_compared_with_plans_that_were_named() -> None:
    found = {
        "1gbit": result(
            contestant("P2->T2", [130.0]), contestant("T2", [100.0]), contestant("auto@ranks=2", [143.0])
        ),
        "4gbit": result(
            contestant("P2->T2", [80.0]),
            contestant("T2", [100.0]),
            contestant("auto@ranks=2", [97.0]),
            contestant("T2@chunk=1", [], error="out of luck"),
        ),
        "none": result(
            contestant("P2->T2", [80.0]), contestant("T2", [100.0]), contestant("auto@ranks=2", [])
        ),
    }
    found["4gbit"]["workloads"][0]["contestants"][3]["options"] = {"plan": "T2"}
    for link, plan in (("1gbit", "D2->T2"), ("4gbit", "T2")):
        found[link]["workloads"][0]["contestants"][2]["about"] = {"plan": plan}
    found["none"]["workloads"][0]["contestants"][2].update(about={}, error="out of luck")
    lines = rig_sweep.speeds(found, 0)
    for line in (
        "| auto@ranks=2 | 143 (143 to 143) | 97 (97 to 97) | failed |",
        "| which took | D2->T2 | T2 | – |",
        "| over the best plan named | **1.10** | **0.97** | – |",
        "| what it took, as it was named, over the best | – | **1.00** | – |",
        "| best re-sharded over best static | **1.30** | **0.80** | **0.80** |",
    ):
        assert line in lines


def test_the_rig_is_profiled_where_a_bench_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    profiles: list[str | None] = []

    def call(command: list[str], environment: dict[str, str]) -> None:
        commands.append(command[command.index("seesaw") :])
        profiles.append(environment.get("SEESAW_PROFILE"))

    monkeypatch.setattr(rig_sweep, "call", call)
    monkeypatch.delenv("SEESAW_PROFILE", raising=False)
    args = argparse.Namespace(ranks=2, quota="auto", profile=True, bench=["--shape", "tiny"])
    assert rig_sweep.run(args, "1gbit") is None
    assert [command[1] for command in commands] == ["profile", "bench"]
    assert profiles[0] == profiles[1] is not None
    args.profile = False
    rig_sweep.run(args, "1gbit")
    assert commands[-1][1] == "bench" and len(commands) == 3 and profiles[-1] is None


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_sweep_that_is_ended_ends_its_bench(stubborn: bool) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    bench = f"import os, signal, time; {ignore} print(os.getpid(), flush=True); time.sleep(60)"
    sweep = (
        "import os, sys; from benchmarks import rig_sweep; rig_sweep.GRACE = 0.2;"
        f"rig_sweep.call([sys.executable, '-c', {bench!r}], dict(os.environ))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", sweep], cwd=rig_sweep.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        benched = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(benched, 0)


def test_what_a_bench_did_not_get_to_costs_no_result() -> None:
    """An interrupted bench leaves contestants without runs or errors, and lacks workloads."""
    found = {
        "1gbit": result(contestant("P2->T2", [130.0]), contestant("T2", [100.0])),
        "4gbit": result(contestant("P2->T2", [120.0]), contestant("T2", [])),
    }
    found["1gbit"]["workloads"] *= 2
    args = argparse.Namespace(ranks=2, quota="auto", record="sweep")
    lines = rig_sweep.report(args, found).splitlines()
    assert "| T2 | 100* (100 to 100) | – |" in lines
    assert "| best re-sharded over best static | **1.30** | – |" in lines
    assert "| T2 | 100* (100 to 100) |" in lines
