"""`seesaw bench` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seesaw.cli.main import app

TINY = ["bench", "--shape", "tiny", "--dtype", "float32"]


def test_a_bench_of_the_real_engine(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--workload", "4x16->4", "--plans", "T1", "--rounds", "2", "--no-floor", "--json", str(out)]
    options += ["--profile", "--logs", str(tmp_path / "logs")]
    record = ["--record", "first", "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(app, [*TINY, *options, *record], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "4x16->4: 4 requests of 16 tokens in, 4 out" in result.stdout
    assert "round 2 of 2: T1" in result.stderr
    (workload,) = json.loads(out.read_text())["workloads"]
    (contestant,) = workload["contestants"]
    assert contestant["about"]["plan"] == "T1"
    assert contestant["ratio"] == 1.0
    for run in contestant["runs"]:
        assert (run["prompt_tokens"], run["output_tokens"]) == (64, 16)
        assert run["details"]["seconds_per_phase"]["mixed"] > 0
        assert run["details"]["phase_tokens"]["mixed"] >= 64 + 4 * 3
        assert run["details"]["steps"]["mixed"] >= 4
    profile = contestant["profile"]
    assert profile["prefill"]["functions"]["attend"] > 0 and profile["decode"]["forwards"] >= 6
    assert "profile" not in contestant["options"]  # a folder of this machine
    (record_file,) = (tmp_path / "results").glob("*-first.md")
    assert "| T1 |" in record_file.read_text() and "T1, decode: a step of" in record_file.read_text()


@pytest.mark.slow
def test_floors_and_transitions_of_a_resharded_plan(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--workload", "sharegpt:4x64", "--plans", "P2->T2 T2", "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(app, [*TINY, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    (workload,) = json.loads(out.read_text())["workloads"]
    first, second = workload["contestants"]
    assert {t["target"] for t in first["runs"][0]["details"]["transitions"]} >= {"T2"}
    assert first["floor"]["prefill"]["flops"] == second["floor"]["prefill"]["flops"] > 0
    assert workload["comparisons"][0]["what"] == "best re-sharded over best static plan"
    assert "P2->T2, decode" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "huge"], "shape 'huge'"),
        (["--workload", "fast"], "workload 'fast'"),
        (["--workload", " "], "--workload"),
        (["--plans", "Q2"], "layout 'Q2'"),
        (["--plans", "P9"], "contestant P9"),
        (["--scale", "0"], "scale"),
        (["--peers", "vllm", "--vllm-python", "/nowhere/python"], "setup.sh"),
        (["--reference", "T4"], "--reference 'T4'"),
        (["--record", "../x"], "--record"),
        (["--node", "/nowhere/node.json"], "/nowhere/node.json"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, [*TINY, "--plans", "T2", *options], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bench_needs_a_contestant() -> None:
    result = CliRunner().invoke(app, [*TINY, "--plans", " "], catch_exceptions=False)
    assert result.exit_code == 2
    assert "--plans" in result.stderr
