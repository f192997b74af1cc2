"""`seesaw plan` as a user meets it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from seesaw.cli import plan as command
from seesaw.cli.main import app
from seesaw.cli.subject import Subject
from seesaw.planning.profiles import save_profile
from seesaw.report.planned_json import RankingEntry
from tests.report.planned import LIMITS, NODE, RESHARDED, candidate, ranking

GIVEN = ["--model", "Llama-3.1-8B", "--hardware", "4xL4", "--workload", "in=300,out=100"]


def invoke(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *words], catch_exceptions=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the search was asked; it answers with the ranking made by hand."""
    seen: dict[str, Any] = {}

    def search_plans(subject: Subject, **options: Any) -> Any:
        seen.update(options, subject=subject)
        return ranking()

    monkeypatch.setattr(command, "search_plans", search_plans)
    return seen


def test_the_tables(asked: dict[str, Any]) -> None:
    result = invoke(*GIVEN)
    assert result.exit_code == 0, result.output
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 100
    text = " ".join(result.stdout.split())
    assert (
        "Run P4->T4: 2,000 tokens/s (prompts and outputs), 3 min 20 s for the job; 1.25× the best static"
        in text
    )
    assert "T4 (best static) 1,600" in text
    assert "seesaw run --model path/to/Llama-3.1-8B --input FILE --plan 'P4->T4' --ranks 4" in text


def test_what_the_search_is_asked(asked: dict[str, Any]) -> None:
    words = (
        "--device-memory 12GiB --host-kv 40GiB --max-running 64 --chunk 512 --requests 77 --seed 3".split()
    )
    assert invoke(*GIVEN, *words, "--weights", "int4", "--kv", "fp8").exit_code == 0
    subject = asked.pop("subject")
    assert asked == {"max_running": 64, "chunk": 512}
    assert (subject.device_memory, subject.host_kv) == (12 << 30, 40 << 30)
    assert (subject.model.name, subject.model.kv_bits, len(subject.workload)) == ("Llama-3.1-8B", 8, 77)
    assert subject.model.weight_bits < 5 and subject.dtype == "bfloat16"
    assert any("quantised" in note for note in subject.notes)


def test_what_is_assumed_is_said(asked: dict[str, Any]) -> None:
    result = invoke("--model", "Mixtral-8x7B", "--hardware", "8xL4")
    notes = " ".join(asked["subject"].notes)
    assert "no --workload given: sharegpt is assumed" in notes
    assert "a host buffer of 256.0 GiB is assumed" in notes
    assert "mixtures of experts" in notes
    assert "sharegpt is assumed" in result.stdout
    # of the 22.5 GiB that nvidia-smi shows of an L4, torch reports 22.0
    assert 21.8 * (1 << 30) < asked["subject"].device_memory < 22.0 * (1 << 30)
    assert asked["subject"].hardware.memory > 22.4 * (1 << 30)


def test_float32_weights_compute_in_float32(asked: dict[str, Any]) -> None:
    invoke(*GIVEN, "--weights", "float32")
    assert (asked["subject"].dtype, asked["subject"].model.kv_bits) == ("float32", 32)


def test_figures_that_do_not_cover_the_type(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    save_profile(profile, msgspec.structs.replace(NODE, flops={"float32": 1e12}))
    result = invoke("--model", "Llama-3.1-8B", "--hardware", str(profile))
    assert result.exit_code == 2
    assert "are for products in float32, not in bfloat16" in result.stderr
    assert "seesaw profile --dtype bfloat16" in result.stderr and "--weights float32" in result.stderr


def test_a_job_file_is_the_input_of_the_command(asked: dict[str, Any], tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_text('{"prompt": "abcdefgh", "max_tokens": 2}\n')
    result = invoke(*GIVEN[:-1], str(job), "--json")
    assert f"--input {job} " in json.loads(result.stdout)["command"]


def test_arrival_times_are_left_aside(asked: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n100,10,5\n")
    invoke(*GIVEN[:-1], str(trace))
    assert asked["subject"].workload.arrival_s is None
    assert any("arrival times are left aside" in note for note in asked["subject"].notes)


@pytest.mark.parametrize("words", [["--json"], ["--json", "-"], ["--json", "--top", "1"]])
def test_json_on_standard_output_is_all_there_is(asked: dict[str, Any], words: list[str]) -> None:
    result = invoke(*GIVEN, *words)
    entry = msgspec.json.decode(result.stdout, type=RankingEntry)
    assert [plan.plan for plan in entry.plans] == ["P4->T4", "T4", "P2T2"]
    assert entry.command.startswith("seesaw run --model path/to/Llama-3.1-8B")


def test_json_and_a_plot_in_files(asked: dict[str, Any], tmp_path: Path) -> None:
    result = invoke(*GIVEN, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.html"))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a.json").read_text())["best"] == "P4->T4"
    assert "Plotly.newPlot(" in (tmp_path / "a.html").read_text()
    assert "Run P4->T4" in result.stdout
    assert f"json: {tmp_path}/a.json\nplot: {tmp_path}/a.html\n" == result.stderr


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written(asked: dict[str, Any], option: str, tmp_path: Path) -> None:
    result = invoke(*GIVEN, option, str(tmp_path / "no" / "file"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option} {tmp_path}/no/file: No such file")


def test_the_profile_of_this_box_is_the_default(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = Path("profile.json")
    monkeypatch.setenv("SEESAW_PROFILE", str(profile))
    words = ["--model", "Llama-3.1-8B", "--workload", "in=300,out=100"]
    missing = invoke(*words)
    assert missing.exit_code == 2
    assert f"this box has no profile ({profile})" in missing.stderr
    assert "`seesaw profile`" in missing.stderr and "--hardware 8xL4" in missing.stderr
    save_profile(profile, msgspec.structs.replace(NODE, device="cpu", memory=10 << 30))
    for more in ([], ["--hardware", str(profile)]):
        result = invoke(*words, *more)
        assert result.exit_code == 0, result.output
        assert f"measured: {profile}" in result.stdout
        subject = asked["subject"]
        assert subject.host_kv == 10 << 30  # a quarter of all
        assert subject.device_memory == (28 - 10) * (1 << 30) // 4


def test_the_command_is_one_that_run_takes(asked: dict[str, Any], tmp_path: Path) -> None:
    """Every option that is printed exists, and what has none is said."""
    import inspect

    from seesaw.cli.run import run

    limits = replace(LIMITS, policy="prefill-first", max_running=64, device_memory=21_500_000_000)
    one = replace(candidate("P4->T4", RESHARDED), limits=limits)
    line, note = command.command_to_run(one, str(tmp_path), "jobs/mine.jsonl")
    words = shlex.split(line)
    assert words[:6] == ["seesaw", "run", "--model", str(tmp_path), "--input", "jobs/mine.jsonl"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert {name.removeprefix("--").replace("-", "_") for name in options} <= set(
        inspect.signature(run).parameters
    )
    assert options["--plan"] == "P4->T4" and options["--device-memory"] == "20.02GiB"
    assert options["--policy"] == "prefill-first" and options["--chunk"] == "512"
    said = "--max-running" in options or "max_running=64" in note
    assert said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "8xL44"], "GPU 'L44' is not in the catalogue; near it: L4"),
        (["--hardware", "nowhere.json"], "profile nowhere.json: there is no such file"),
        (["--hardware", "99xL4"], "99 ranks"),
        (["--model", "Llama-3.1-9B"], "near names are Llama-3.1-8B"),
        (["--workload", "sharegtp"], "did you mean sharegpt?"),
        (["--workload", "in=0,out=5"], "at least 1 token"),
        (["--workload", "in=500000,out=5"], "no request fits 131,072 tokens"),
        (["--weights", "int3"], "weights='int3': choose one of"),
        (["--kv", "int4"], "kv='int4': choose one of"),
        (["--device-memory", "much"], "--device-memory: size 'much'"),
        (["--host-kv", "much"], "--host-kv: size 'much'"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(words: list[str], said: str) -> None:
    result = invoke(*GIVEN, *words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("prompt_tokens,output_tokens\n", "no request"),
        ("prompt_tokens,output_tokens\n10,5\n20,many\n", "line 3"),
    ],
)
def test_bad_traces(text: str, said: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    result = invoke(*GIVEN[:-1], str(trace))
    assert result.exit_code == 2
    assert str(trace) in result.stderr and said in result.stderr


def test_planning_is_light(tmp_path: Path) -> None:
    """Neither help nor a search imports what takes long."""
    heavy = "('torch', 'scipy', 'plotly', 'transformers', 'pandas')"
    for words in (["plan", "--help"], ["plan", *GIVEN, "--requests", "20"]):
        code = (
            "import sys\nfrom seesaw.cli.main import app\n"
            f"try:\n    app({words!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            f"found = [name for name in {heavy} if name in sys.modules]\n"
            "sys.exit(f'imported {found}' if found else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_real_search(tmp_path: Path) -> None:
    """The planner itself, on a job of two lengths; the plan it names is the fastest it replayed."""
    words = ["--requests", "60", "--json", str(tmp_path / "plan.json"), "--device-memory", "12GiB"]
    result = invoke(*GIVEN, *words)
    assert result.exit_code == 0, result.stderr
    entry = msgspec.json.decode((tmp_path / "plan.json").read_text(), type=RankingEntry)
    replayed = [plan for plan in entry.plans if plan.replay is not None]
    assert entry.best == replayed[0].plan and f"Run {entry.best}:" in result.stdout
    assert [plan.seconds for plan in replayed] == sorted(plan.seconds for plan in replayed)
    assert entry.best_static is not None and f"{entry.best_static} (best static)" in result.stdout
    assert all(0 < plan.share_of_bound <= 1 for plan in replayed)
    assert "…" not in result.stdout


def test_a_model_that_fits_nowhere() -> None:
    result = invoke("--model", "Llama-3.1-405B", "--hardware", "8xL4", "--requests", "20")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: Llama-3.1-405B")
    assert "8xL4" in result.stderr
