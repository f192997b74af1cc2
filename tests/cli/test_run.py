"""`seesaw run`: arguments, exit codes, what is printed; on an engine whose answers are known."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import seesaw
from seesaw.cli import progress, run
from seesaw.cli.main import app
from seesaw.core.errors import MemoryBudgetError, StartupError, WorkerError
from seesaw.jobs.base import JobEngine, JobProgress
from tests.jobs.contract import read
from tests.jobs.echo_engine import EchoEngine

Invoke = Callable[..., Result]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    """The engine that `invoke` gives to the command; `opened` collects what it was asked for."""
    echo = EchoEngine()

    def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
        echo.opened = {"model": model, **options}  # type: ignore[attr-defined]
        return echo

    monkeypatch.setattr(run, "open_engine", open_engine)
    return echo


@pytest.fixture
def invoke(tmp_path: Path, engine: EchoEngine) -> Invoke:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"id": "a", "prompt": "abc"}\n{"id": "b", "prompt": "de"}\n')

    def call(*options: str, **replaced: str) -> Result:
        arguments = {"model": "m", "input": str(source), **replaced}
        line = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        return CliRunner().invoke(app, ["run", *line, *options], catch_exceptions=False)

    return call


def opened(engine: EchoEngine) -> dict[str, Any]:
    return engine.opened  # type: ignore[attr-defined,no-any-return]


def test_a_job(invoke: Invoke, engine: EchoEngine, tmp_path: Path) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert {a["custom_id"] for a in read(tmp_path / "in.output.jsonl")} == {"a", "b"}
    assert "2 answered, 0 failed" in result.stdout
    assert "1 to T2 (delta): 3.00 MiB in 0.2 s" in result.stdout
    assert str(tmp_path / "in.output.jsonl") in result.stdout.replace("\n", "")
    assert engine.closed


def test_every_option_reaches_the_engine(invoke: Invoke, engine: EchoEngine, tmp_path: Path) -> None:
    options = (
        "--plan P2->T2 --ranks 2 --device cpu --device-memory 64MiB --host-kv 1.5GiB --dtype float32 "
        "--load-format dummy --policy prefill-first --chunk 128 --max-running 9 --max-model-len 99 "
        "--transition delta --seed 5 --limit 1 --threads-per-rank 2 --sync-loop --served-model-name name "
        "--on-rank-loss stop"
    ).split()
    files = ["--output", str(tmp_path / "o.jsonl"), "--errors", str(tmp_path / "e.jsonl")]
    files += ["--trace", str(tmp_path / "t.json")]
    assert invoke(*options, *files).exit_code == 0
    assert opened(engine) == {
        "model": "m",
        "plan": "P2->T2",
        "ranks": 2,
        "device": "cpu",
        "ranks_per_gpu": 1,
        "on_rank_loss": "stop",
        "device_memory": 64 << 20,
        "host_kv": 3 << 29,
        "dtype": "float32",
        "load_format": "dummy",
        "policy": "prefill-first",
        "max_model_len": 99,
        "seed": 5,
        "chunk": 128,
        "max_running": 9,
        "transition": "delta",
        "overlap": False,
        "threads_per_rank": 2,
        "preflight": "limits",
        "trace": str(tmp_path / "t.json"),
    }
    (answer,) = read(tmp_path / "o.jsonl")
    assert answer["response"]["body"]["model"] == "name"


def test_settings_for_rows_that_do_not_say(invoke: Invoke, engine: EchoEngine, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"prompt": "abc"}\n{"prompt": "abc", "max_tokens": 3, "temperature": 0.5}\n')
    assert invoke("--max-tokens", "2", "--temperature", "0", input=str(source)).exit_code == 0
    assert [(r.sampling.max_tokens, r.sampling.temperature) for r in engine.requests] == [(2, 0.0), (3, 0.5)]
    changed = invoke("--max-tokens", "4", "--temperature", "0", input=str(source))
    assert changed.exit_code == 2 and "--max-tokens is 4, was 2" in changed.stderr


def test_options_are_those_of_the_engine() -> None:
    """No name that the engine does not know, and its defaults where the command has its own."""
    import inspect

    from seesaw.options import Options

    ours = inspect.signature(run.run).parameters
    theirs = Options.__dataclass_fields__
    shared = set(ours) & set(theirs)
    assert shared == set(ours) - {
        *("input", "output", "errors", "limit", "served_model_name", "sync_loop", "debug"),
        *("ordered", "retry_errors", "force"),
        *("prompt_column", "id_column", "keep_column"),
        *("metrics_port", "metrics_host", "generation_config", "max_tokens", "temperature"),
    }
    same = shared - {"model", "preflight"}  # the command knows the job, by which it chooses what to check
    assert {n: ours[n].default for n in same} == {n: theirs[n].default for n in same}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "X9"], "layout 'X9': expected"),
        (["--plan", "P2->T3"], "P2 has 2 ranks and T3 has 3"),
        (["--device-memory", "lots"], "--device-memory: size 'lots': expected bytes or a number with a unit"),
        (["--host-kv", "5 parsecs"], "--host-kv: size '5 parsecs'"),
        (["--policy", "greedy"], "chunked"),
        (["--ranks", "0"], "--ranks"),
        (["--limit", "-1"], "--limit"),
        (["--output", "/nowhere/o.jsonl"], "/nowhere/o.jsonl: the directory /nowhere does not exist"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_unusable_arguments(
    options: list[str], said: str, invoke: Invoke, engine: EchoEngine, tmp_path: Path
) -> None:
    result = invoke(*options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not hasattr(engine, "opened")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_input(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(input=str(tmp_path / "none.jsonl"))
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none.jsonl'}: cannot be read (No such file or directory)\n"


def test_the_input_is_never_overwritten(invoke: Invoke, tmp_path: Path) -> None:
    before = (tmp_path / "in.jsonl").read_bytes()
    assert invoke("--output", str(tmp_path / "in.jsonl")).exit_code == 2
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_failed_rows_exit_with_1(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"id": "a", "prompt": "abc"}\n{"id": "b", "prompt": ""}\nx')
    result = invoke()
    assert result.exit_code == 1
    assert "1 answered, 2 failed" in result.stdout
    assert "empty_prompt 1" in result.stdout
    assert "invalid_json 1" in result.stdout
    assert "in.output.errors.jsonl" in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerError("rank 1 died", rank=1, phase="decode", details="Traceback …"), 3),
        (MemoryBudgetError("does not fit"), 2),
        (RuntimeError("a bug"), 3),
    ],
)
def test_errors_on_the_way(error: Exception, code: int, invoke: Invoke, engine: EchoEngine) -> None:
    engine.fail_after, engine.error = 1, error
    result = invoke()
    assert result.exit_code == code
    assert str(error) in result.stderr
    assert "1 rows are safe" in result.stderr and "in.output.jsonl.part; the same command" in result.stderr
    assert "Traceback" not in result.output
    assert engine.closed


def test_debug_shows_the_traceback(invoke: Invoke, engine: EchoEngine) -> None:
    engine.fail_after, engine.error = 1, RuntimeError("a bug")
    result = invoke("--debug")
    assert result.exit_code == 3
    assert "Traceback (most recent call last)" in result.stderr


def test_an_engine_that_does_not_start(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
        raise StartupError("rank 0 did not become ready in 120 s")

    monkeypatch.setattr(run, "open_engine", open_engine)
    result = invoke()
    assert result.exit_code == 1
    assert result.stderr == "error: rank 0 did not become ready in 120 s\n"


def test_interruption_of_the_job(invoke: Invoke, engine: EchoEngine, tmp_path: Path) -> None:
    engine.fail_after = 1
    result = invoke()
    assert result.exit_code == 3
    assert "interrupted" in result.stderr
    assert "1 answered" in result.stdout
    assert len(read(tmp_path / "in.output.jsonl.part")) == 1
    assert engine.closed


def test_interruption_while_starting(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_engine", open_engine)
    result = invoke()
    assert (result.exit_code, result.stderr) == (3, "interrupted\n")


def test_version_and_help() -> None:
    for module in (["-m", "seesaw"], ["-c", "from seesaw.cli.main import main; main()"]):
        result = subprocess.run(
            [sys.executable, *module, "--version"], capture_output=True, text=True, check=True
        )
        assert result.stdout == f"seesaw {seesaw.__version__}\n"
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "120"}).stdout
    assert "--device-memory" in shown
    assert "Exit code" in shown


@pytest.mark.parametrize("command", ["", "run", "report", "plan", "simulate", "devices", "profile", "bench"])
def test_switches_are_shown_without_a_type(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "120"}).stdout
    assert "--help" in shown and "bool" not in shown.lower()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom seesaw.cli.main import app\n"
        "app(['run', '--help'], standalone_mode=False)\n"
        "bad = {'torch', 'transformers', 'numpy', 'scipy', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def sample(elapsed: float, answered: int, total: int | None, tokens: tuple[int, int] = (0, 0)) -> JobProgress:
    from dataclasses import replace

    stats = replace(EchoEngine().stats(), prompt_tokens=tokens[0], output_tokens=tokens[1])
    return JobProgress(
        rows_answered=answered, rows_failed=2, rows_total=total, elapsed_seconds=elapsed, stats=stats
    )


def test_rates_are_of_the_last_seconds() -> None:
    rates = progress.Rates()
    assert rates.update(sample(0, 0, None)) == (0, 0)
    assert rates.update(sample(2, 0, None, (100, 10))) == (50, 5)
    for second in range(3, 40):
        last = rates.update(sample(second, 0, None, (100, 10 + 7 * (second - 2))))
    assert last == (0, 7)


def test_description_and_time_left() -> None:
    assert progress.describe(sample(30, 98, 1100), (1234.4, 56.0)) == (
        "decode, rows 100/1,100, failed 2, tokens/s 1,234 in 56 out, left 5 min 00 s"
    )
    assert progress.describe(sample(30, 0, None), (0, 0)) == "decode, rows 2, failed 2, tokens/s 0 in 0 out"


def test_log_lines_come_seldom(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="seesaw"):
        show = progress._log_lines(seconds=3600)
        for second in range(5):
            show(sample(second, second, 10))
        assert caplog.messages == []
        show = progress._log_lines(seconds=0)
        show(sample(1, 1, 10))
    assert len(caplog.messages) == 1
    assert "rows 3/10" in caplog.messages[0]


def test_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress._bar() as show:
        show(sample(30, 98, 1100))
    shown = capsys.readouterr().err
    assert "rows 100/1,100" in shown
    assert "decode" in shown


def test_inputs_by_pattern_and_columns_by_name(invoke: Invoke, tmp_path: Path) -> None:
    for name, rows in (("b", "k1,first,x\n"), ("a", "k2,second,y\n")):
        (tmp_path / f"part-{name}.csv").write_text(f"key,text,topic\n{rows}")
    named = ("--prompt-column", "text", "--id-column", "key")
    output = tmp_path / "out.csv"
    result = invoke(*named, "--output", str(output), input=str(tmp_path / "part-*.csv"))
    assert result.exit_code == 0, result.output
    assert "part-a.csv and 1 more: prompts from text; ids from key; passed through: topic" in result.stderr
    assert sorted(output.read_text().splitlines()) == [
        "id,topic,text,finish_reason,prompt_tokens,completion_tokens",
        "k1,x,tsrif,stop,5,5",
        "k2,y,dnoces,stop,6,6",
    ]
    refused = invoke(*named, "--output", str(output), input=str(tmp_path / "part-a.csv"))
    assert refused.exit_code == 2 and "1 input file, were 2" in refused.output
    output = tmp_path / "again.csv"
    result = invoke(
        *named, "--keep-column", "key", "--output", str(output), input=str(tmp_path / "part-a.csv")
    )
    assert result.exit_code == 0, result.output
    assert output.read_text().splitlines()[1] == "k2,k2,dnoces,stop,6,6"


def test_unusable_inputs_are_found_before_the_engine(
    invoke: Invoke, engine: EchoEngine, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,2\n")
    source = str(tmp_path / "in.csv")
    for options, replaced, said in (
        ([], {"input": str(tmp_path / "*.parquet")}, f"{tmp_path}/*.parquet: matches no file"),
        ([], {"input": source}, "choose one with --prompt-column; the columns are 'a', 'b'"),
        (["--prompt-column", "q"], {"input": source}, "has no column 'q' (--prompt-column)"),
        (["--input", source], {"input": source}, f"{source}: is named twice among the inputs"),
        ([], {"input": "."}, ".: is a directory; expected a file, or a pattern such as './*.jsonl'"),
        (["--output", str(tmp_path / "o.xlsx")], {}, "cannot be written in the format of that name"),
        ([], {"input": "-"}, "the input is standard input; name the output with --output"),
    ):
        result = invoke(*options, **replaced)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert said in result.stderr
    assert not hasattr(engine, "opened")
