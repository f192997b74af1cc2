"""What `seesaw run` leaves for `seesaw report`, and how it is watched while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from seesaw.cli import run
from seesaw.cli.main import app
from seesaw.core.errors import WorkerError
from seesaw.jobs.base import JobEngine
from seesaw.recording.record import load_record
from tests.checkpoints import make_checkpoint
from tests.cli.test_real_run import command, endless
from tests.jobs.echo_engine import EchoEngine
from tests.test_text import save

Invoke = Callable[..., Result]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    echo = EchoEngine()

    def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
        return echo

    monkeypatch.setattr(run, "open_engine", open_engine)
    return echo


@pytest.fixture
def invoke(tmp_path: Path, engine: EchoEngine) -> Invoke:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"id": "a", "prompt": "abc"}\n{"id": "b", "prompt": 5}\n{"prompt": "c"}\n')

    def call(*options: str) -> Result:
        line = ["run", "--model", "m", "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
        return CliRunner().invoke(app, [*line, *options], catch_exceptions=False)

    return call


def test_a_run_is_recorded_and_drawn(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("--seed", "3")
    assert result.exit_code == 1
    assert f"run record    {tmp_path / 'out.run'}" in result.stdout
    (found,) = load_record(tmp_path / "out.run").runs
    assert (found.state, found.rows_answered, found.failures) == ("finished", 2, {"invalid_type": 1})
    assert found.command["output"] == str(tmp_path / "out.jsonl")
    assert found.command["options"]["seed"] == 3
    drawn = CliRunner().invoke(app, ["report", str(tmp_path / "out.run")])
    assert drawn.exit_code == 0, drawn.output
    page = tmp_path / "out.run" / "report.html"
    assert drawn.stdout.splitlines()[-1] == f"report: {page}"
    assert "in.jsonl through m" in page.read_text()


def test_the_page_goes_where_it_is_wanted(invoke: Invoke, tmp_path: Path) -> None:
    invoke()
    there = CliRunner().invoke(
        app, ["report", str(tmp_path / "out.run"), "--output", str(tmp_path / "p.html")]
    )
    assert there.stdout.splitlines()[-1] == f"report: {tmp_path / 'p.html'}"
    nowhere = CliRunner().invoke(app, ["report", str(tmp_path / "out.run"), "--output", str(tmp_path)])
    assert nowhere.exit_code == 2
    assert nowhere.stderr == f"error: {tmp_path}: cannot be written: Is a directory\n"


def test_what_was_not_recorded_cannot_be_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "no run was recorded here" in result.stderr


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (WorkerError("rank 1 died", rank=1, phase="run"), "failed", "rank 1 died"),
    ],
)
def test_runs_that_end_badly_are_recorded(
    error: BaseException, state: str, said: str | None, invoke: Invoke, engine: EchoEngine, tmp_path: Path
) -> None:
    engine.fail_after, engine.error = 1, error
    assert invoke().exit_code in (1, 3)
    (found,) = load_record(tmp_path / "out.run").runs
    assert (found.state, found.error) == (state, said)


def test_a_trace_that_cannot_be_written_is_refused_at_once(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("--trace", str(tmp_path / "nowhere" / "t.json"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: trace {tmp_path}/nowhere/t.json: cannot be written: ")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_port_that_is_taken_is_refused_at_once(invoke: Invoke, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("--metrics-port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "Address already in use" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_metrics_are_served_while_the_job_runs(
    invoke: Invoke, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scraped = []
    answer = engine._answer

    def scraping(request: Any) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            scraped.append(page.read().decode())
        return answer(request)

    monkeypatch.setattr(engine, "_answer", scraping)
    assert invoke("--metrics-port", str(port)).exit_code == 1
    assert all('seesaw_plan_info{plan="P2->T2"} 1.0' in text for text in scraped)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)


def wait_for_decoding(trace: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # that it can be written is tried before the job begins, by a file that goes again
        with contextlib.suppress(FileNotFoundError):
            if b'"decode"' in trace.read_bytes():
                return
        time.sleep(0.05)


def test_an_interrupted_job_leaves_a_whole_trace_and_goes_on_in_its_record(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", vocab_size=420, eos_token_id=2)
    save(model, "byte-level")
    source, trace = endless(tmp_path / "in.jsonl"), tmp_path / "t.json"
    line = [*command(model, source, "--plan", "P2->T2"), "--trace", str(trace)]
    job = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_decoding(trace)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=30) == 3
    names = {event["name"] for event in json.loads(trace.read_text())}
    assert names >= {"prefill", "decode", "transition", "schedule"}
    subprocess.run([*line, "--limit", "5", "--force"], check=True, stdout=subprocess.DEVNULL)
    first, second = load_record(tmp_path / "out.run").runs
    assert (first.state, second.state) == ("interrupted", "finished")
    assert first.stats is not None and first.stats.tokens_sampled > 0
    assert first.setup is not None and first.setup.plan == "P2->T2"
    assert second.rows_answered <= 5  # some of the first were answered before
    drawn = subprocess.run(
        [sys.executable, "-m", "seesaw", "report", str(tmp_path / "out.run")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert drawn.stdout.endswith("report.html\n")
