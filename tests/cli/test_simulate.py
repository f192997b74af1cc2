"""`seesaw simulate` as a user meets it: real replays of a small job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from seesaw.cli.main import app
from seesaw.cli.simulate import parse_plans
from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan
from seesaw.planning import workload_files
from seesaw.planning.catalogue import hardware
from seesaw.planning.profiles import save_profile
from seesaw.report.planned_json import SimulationEntry

GIVEN = ["--model", "Llama-3.1-8B", "--hardware", "2xL4", "--workload", "in=300,out=30", "--requests", "20"]


def invoke(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["simulate", *words], catch_exceptions=False)


def replays(*words: str) -> SimulationEntry:
    """What `--json` says."""
    result = invoke(*GIVEN, *words, "--json")
    assert result.exit_code == 0, result.stderr
    return msgspec.json.decode(result.stdout, type=SimulationEntry)


def test_one_plan() -> None:
    result = invoke(*GIVEN, "--plan", "P2->T2")
    assert result.exit_code == 0, result.stderr
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 100
    text = " ".join(result.stdout.split())
    assert "20 requests (6,000 tokens in, 600 out)" in text
    for piece in (
        "P2->T2: policy seesaw",
        "Phases",
        "prefill",
        "decode",
        "transition",
        "full at most",
        "limits",
    ):
        assert piece in text


def test_json_of_one_plan() -> None:
    entry = replays("--plan", "P2->T2", "--chunk", "256", "--max-running", "8", "--transition", "reload")
    (plan,) = entry.plans
    assert (plan.plan, plan.error, plan.over_first) == ("P2->T2", None, 1.0)
    assert (plan.settings.chunk, plan.settings.max_running) == (256, 8)
    assert (plan.settings.policy, plan.settings.transition) == ("seesaw", "reload")
    replay = plan.replay
    assert replay is not None and plan.share_of_bound is not None
    assert (replay.requests, replay.prompt_tokens, replay.output_tokens) == (20, 6000, 600)
    assert sum(phase.seconds for phase in replay.phases.values()) == pytest.approx(replay.seconds)
    assert 0 < plan.share_of_bound <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--compare", "P2->T2", "T2", "P2"],
        ["--compare", "P2->T2 T2,P2"],
        ["--compare", "P2->T2", "--compare", "T2", "--compare", "P2"],
        ["P2->T2", "T2", "P2"],
        ["--plan", "P2->T2", "--compare", "T2", "P2"],
        ["--compare", "P2→T2", "T2", "P2", "--seed", "0"],
    ],
)
def test_several_plans_however_they_are_written(words: list[str]) -> None:
    entry = replays(*words)
    assert [Plan.parse(plan.plan) for plan in entry.plans] == [
        Plan.parse(text) for text in ("P2->T2", "T2", "P2")
    ]
    assert entry.plans[0].over_first == 1.0
    for plan in entry.plans:
        assert plan.replay is not None and plan.over_first is not None
        first = entry.plans[0].replay
        assert first is not None
        assert plan.over_first == pytest.approx(plan.replay.tokens_per_second / first.tokens_per_second)


def test_the_comparison_on_the_terminal() -> None:
    result = invoke(*GIVEN, "--compare", "P2->T2", "T2@chunk=512")
    assert result.exit_code == 0, result.stderr
    assert "Plans, in the order given" in result.stdout
    assert "@chunk=512" in result.stdout and "1.00" in result.stdout and "…" not in result.stdout


def test_plans_with_settings_of_their_own() -> None:
    asked: dict[str, Any] = {"chunk": 256, "policy": None}
    (one, two) = parse_plans(["P2->T2:prefill-first@chunk=512,host-kv=1GiB,T2@max_running=8"], asked)
    assert one == (
        "P2->T2:prefill-first@chunk=512,host-kv=1GiB",
        {"plan": Plan.parse("P2->T2"), "policy": "prefill-first", "chunk": 512, "host_kv": 1 << 30},
    )
    assert two == (
        "T2@max_running=8",
        {"plan": Plan.parse("T2"), "policy": None, "chunk": 256, "max_running": 8},
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("T2@chunk", "'chunk' is no setting"),
        ("T2@speed=9", "'speed=9' is no setting"),
        ("T2@chunk=0", "chunk=0 must be a whole number of at least 1"),
        ("T2@host_kv=many", "size 'many'"),
        ("Q2", "layout 'Q2'"),
        ("@chunk=2", "layout ''"),
        ("", "no plan given"),
        ("P2-", "quote it"),
    ],
)
def test_plans_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_plans([text], {})


def test_a_policy_changes_what_happens() -> None:
    often, seldom = (plan.replay for plan in replays("P2->T2:prefill-first@max_running=4", "P2->T2").plans)
    assert often is not None and seldom is not None
    assert often.transitions > seldom.transitions


def test_arrivals_and_their_latencies(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i * 2},200,20\n" for i in range(10))
    )
    words = ["--workload", str(trace), "--requests", "10", "--plan", "T2"]
    arriving, at_once = (
        replays(*words, option).plans[0].replay for option in ("--arrivals", "--no-arrivals")
    )
    assert arriving is not None and arriving.latency is not None and at_once is not None
    assert arriving.seconds > 18 > at_once.seconds
    assert at_once.latency is None
    assert 0 < arriving.latency.ttft["p50"] <= arriving.latency.ttft["p99"]
    shown = invoke(*GIVEN, *words)
    assert "Latencies" in shown.stdout and "to the first token" in shown.stdout
    both = invoke(*GIVEN, *words, "P2")
    assert "50 / 99 %" in both.stdout


def test_requests_beyond_the_context_are_left_out(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_tokens,output_tokens\n100,10\n900,200\n")
    words = ["--workload", str(trace), "--requests", "2", "--plan", "T2"]
    assert replays(*words).plans[0].settings.max_model_len == 1100
    entry = replays(*words, "--max-model-len", "1000")
    assert entry.workload.requests == 1
    assert any("left out that exceed 1,000 tokens" in note for note in entry.workload.notes)
    assert entry.plans[0].settings.max_model_len == 1000


def test_groups_without_figures(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    save_profile(
        profile, msgspec.structs.replace(hardware("4xL4"), all_reduce={2: hardware("4xL4").all_reduce[2]})
    )
    result = invoke(*GIVEN, "--hardware", str(profile), "--compare", "T4", "P2T2")
    assert result.exit_code == 1
    assert "no all-reduce of 4 ranks is known of L4, only of 2" in " ".join(result.stdout.split())


def test_a_job_too_large_to_keep_is_replayed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload_files, "MOST_ROWS", 64)
    job = tmp_path / "job.jsonl"
    job.write_text('{"prompt": "abcdefgh", "max_tokens": 2}\n' * 200)
    entry = replays("--workload", str(job), "--requests", "200", "--plan", "T2")
    assert entry.workload.requests == entry.workload.sampled <= 64
    assert any("of the 200 requests is replayed" in note for note in entry.notes)


def test_a_plan_that_does_not_fit_beside_one_that_does() -> None:
    result = invoke(*GIVEN, "--device-memory", "12GiB", "--compare", "T2", "D2")
    assert result.exit_code == 1
    assert "refused" in result.stdout and "D2: plan D2 does not fit" in " ".join(result.stdout.split())
    alone = invoke(*GIVEN, "--device-memory", "12GiB", "--plan", "D2")
    assert alone.exit_code == 2
    assert alone.stderr.startswith("error: D2: plan D2 does not fit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no plan given: name one with --plan"),
        (["--plan", "T4"], "plan T4 is for 4 ranks, but the node (2 × L4) has 2"),
        (["--plan", "P2->T4"], "P2 has 2 ranks and T4 has 4"),
        (["--plan", "T2", "--policy", "greedy"], "policy 'greedy': choose one of"),
        (["--plan", "P2->T2", "--policy", "chunked"], "policy chunked mixes both phases"),
        (["--plan", "P2->T2:hasty"], "policy 'hasty': choose one of"),
        (["--plan", "T2", "--hardware", "2xL5"], "GPU 'L5' is not in the catalogue"),
        (["--plan", "T2", "--model", "Lama-2-70B"], "Llama-2-70B"),
        (["--plan", "T2@transition=slow"], "transition 'slow': choose one of resident, delta, reload"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(words: list[str], said: str) -> None:
    result = invoke(*GIVEN, *words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr and "Traceback" not in result.stderr
