"""Tables, JSON and records of made-up results."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

from seesaw.bench.contestant import Contestant
from seesaw.bench.floor import Floor, Rates, Work
from seesaw.bench.machine import command_line, machine, versions
from seesaw.bench.output import Context, show, write_record
from seesaw.bench.probe import ProbeResult
from seesaw.bench.results import Entry, Run, WorkloadResult, comparisons
from seesaw.bench.runner import BenchOptions, BenchResult
from seesaw.bench.tables import workload_tables
from seesaw.bench.workloads import Workload

RATES = Rates(flops=100e9, bandwidth=10e9)
FLOOR = Floor(
    rates=RATES,
    dtype="bfloat16",
    prefill=Work(1.0, 80e9, 2e9),
    decode=Work(2.0, 10e9, 20e9),
    decode_steps=15,
    mean_batch=4.0,
)


def entry(name: str, seconds: list[float], kind: str = "seesaw", error: str | None = None) -> Entry:
    details = {
        "seconds_per_phase": {"prefill": 2.0, "decode": 4.0},
        "steps": {"prefill": 2, "decode": 16},
        "host_seconds": {"decode": 0.016},
        "rank_host_seconds": {"decode": 0.008},
        "transitions": [
            {
                "target": "T2",
                "bytes": 1 << 30,
                "seconds": 0.7,
                "mode": "delta",
                "copied_bytes": 1 << 28,
                "moving_seconds": 0.5,
            }
        ],
    }
    plan = {"plan": name} if kind == "seesaw" else {"layout": name.removeprefix("vllm:")}
    about = {"transition": "delta"} if kind == "seesaw" else {"vllm": "0.32.0"}
    runs = [
        Run(
            round=i,
            seconds=s,
            prompt_tokens=200,
            others=0.3,
            output_tokens=100,
            details=details if kind == "seesaw" else {},
        )
        for i, s in enumerate(seconds)
    ]
    contestant = Contestant(name=name, kind=kind, command=(), options={**plan, "dtype": "bfloat16"})
    return Entry(
        contestant=contestant,
        about=about,
        start_seconds=1.5,
        runs=runs,
        error=error,
        floor=FLOOR if seconds else None,
        copy_rate=4e9,
    )


@pytest.fixture
def found() -> BenchResult:
    entries = [
        entry("P2->T2", [6.0, 5.0, 7.0]),
        entry("T2", [10.0, 10.0, 30.0]),
        entry("vllm:TP1", [12.0, 12.0, 12.0], "vllm"),
        entry("vllm:TP2", [20.0, 20.0, 20.0], "vllm"),
        entry("vllm:PP2", [], "vllm", error="ended by SIGKILL; it said nothing"),
    ]
    probe = ProbeResult(
        ranks=2,
        products={"torch bfloat16": 100e9, "torch float32": 60e9},
        product_alone={"torch bfloat16": 55e9, "torch float32": 31e9},
        sizes={},
        read=10e9,
        read_alone=7e9,
        copy=4e9,
        copy_alone=3e9,
    )
    result = WorkloadResult(workload=Workload("short", ((50, 25),) * 4), entries=entries)
    return BenchResult(options=BenchOptions(rounds=3), results=[result], probes={2: probe})


CONTEXT = Context(
    shape="270m",
    command="seesaw bench --rounds 3",
    machine={"processor": "a | b"},
    versions={"seesaw": "1"},
    day=date(2026, 1, 2),
    note="On a rig.",
)


def test_medians_and_ratios(found: BenchResult) -> None:
    first, second, *_ = found.results[0].entries
    assert (first.seconds, first.rate) == (6.0, 50.0)
    assert second.rate == 30.0
    assert [(what, e.name, o.name, round(r, 3)) for what, e, o, r in comparisons(found.results[0])] == [
        ("best Seesaw over best vLLM", "P2->T2", "vllm:TP1", 2.0),
        ("best re-sharded over best static plan", "P2->T2", "T2", 1.667),
    ]


def test_tables(found: BenchResult) -> None:
    result = found.results[0]
    contestants, phases, transitions = workload_tables(result, result.entries[2])
    assert contestants.columns[6] == "× vllm:TP1"
    assert contestants.rows[0] == ["P2->T2", "1.5", "3", "6.00", "50", "43 to 60", "2.00", "50%"]
    assert contestants.rows[-1] == ["vllm:PP2", "1.5", "0", "–", "–", "–", "–", "–"]
    assert contestants.notes[-2] == "vllm:PP2 failed: ended by SIGKILL; it said nothing"
    assert "30% of the machine's cores" in contestants.notes[-1]
    assert phases.rows[:2] == [
        ["P2->T2, prefill", "2.00", "1.00", "50%", "40%", "1.0", "2", "1,000.00", "–", "–"],
        ["P2->T2, decode", "4.00", "2.00", "50%", "2%", "5.0", "16", "250.00", "1.00", "0.50"],
    ]
    assert transitions.rows[0] == ["P2->T2", "1", "delta", "0.500", "8.3%", "1.25 GiB", "2.7", "1.49"]


def test_the_probe_keeps_the_accuracy_of_the_type(found: BenchResult) -> None:
    probe = found.probes[2]
    assert probe.rates("bfloat16") == RATES
    assert probe.best_product("bfloat16") == "torch bfloat16"
    assert probe.rates("float32").flops == 60e9


def test_the_best_of_two_probes_counts(found: BenchResult) -> None:
    first = found.probes[2]
    second = dataclasses.replace(
        first,
        products={"torch bfloat16": 90e9, "torch float32": 70e9, "cpu float32": 1e9},
        read=12e9,
        copy=3e9,
    )
    for both in (first.best_of(second), second.best_of(first)):
        assert both.products == {"torch bfloat16": 100e9, "torch float32": 70e9, "cpu float32": 1e9}
        assert (both.read, both.copy, both.copy_alone) == (12e9, 4e9, 3e9)
        assert both.product_alone == first.product_alone


def test_the_terminal_shows_everything(found: BenchResult) -> None:
    console = Console(width=160, file=io.StringIO(), color_system=None)
    show(found, None, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for piece in ("P2->T2, decode", "best Seesaw over best vLLM: P2->T2 over vllm:TP1, 2.00 ×", "× vllm:TP1"):
        assert piece in text


def test_a_record_says_how_to_repeat_it(found: BenchResult, tmp_path: Path) -> None:
    path = write_record(tmp_path / "results", "my-run", found, CONTEXT)
    assert path.name == "2026-01-02-my-run.md"
    text = path.read_text()
    for piece in (
        "# my-run: 270m, 2026-01-02",
        "On a rig.",
        "    seesaw bench --rounds 3\n",
        "| processor | a \\| b |",
        "| vllm | 0.32.0 |",
        "## short: 4 requests of 50 tokens in, 25 out",
        "| P2->T2 | 1.5 | 3 | 6.00 | 50 | 43 to 60 | 2.00 | 50% |",
        "- best re-sharded over best static plan: P2->T2 over T2, 1.67 ×",
        "## What the floors assume",
    ):
        assert piece in text
    data = json.loads(path.with_suffix(".json").read_text())
    contestants = {one["name"]: one for one in data["workloads"][0]["contestants"]}
    assert contestants["P2->T2"]["ratio"] == 2.0
    assert [run["seconds"] for run in contestants["T2"]["runs"]] == [10.0, 10.0, 30.0]
    assert contestants["P2->T2"]["floor"]["seconds"] == 3.0
    assert contestants["vllm:PP2"]["error"].startswith("ended by SIGKILL")
    assert data["probes"]["2"]["products"]["torch bfloat16"] == 100e9


def test_what_is_said_of_the_machine() -> None:
    assert machine()["kernel"] == platform.release()
    assert machine()["processor"]
    assert "torch" in versions()
    assert command_line(["bench", "--plans", "P2->T2 T2"]) == "seesaw bench --plans 'P2->T2 T2'"
