"""The record of a job, as files: written while it runs, continued by the next sitting, never in the job's way."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.stats import EngineStats, TransitionRecord
from seesaw.recording import recorder
from seesaw.recording.bounded import History, PhaseSpan
from seesaw.recording.describe import new_run
from seesaw.recording.record import Run, load_record, run_directory
from seesaw.recording.recorder import Counts, RunRecorder
from tests.jobs.echo_engine import EchoEngine

COMMAND = {"model": "m", "input": ["in.jsonl"], "output": "out.jsonl"}
HISTORY = History(phases=[PhaseSpan(0.0, 2.0, "decode")], prompts={5: 2}, outputs={3: 2}, sample=[(5, 3)] * 2)


def stats() -> EngineStats:
    return EchoEngine().stats()


def start(directory: Path, run: Run | None = None) -> RunRecorder:
    return RunRecorder(
        directory, run or new_run(COMMAND), stats=stats, history=lambda: HISTORY, setup=lambda: None
    )


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("a/orders.jsonl", "a/orders.run"),
        ("orders.parquet", "orders.run"),
        ("x.jsonl.zst", "x.run"),
        ("v1.2", "v1.run"),
    ],
)
def test_the_folder_is_named_after_the_output(output: str, folder: str) -> None:
    assert run_directory(Path(output)) == Path(folder)


def test_a_record_is_there_from_the_start_and_complete_at_the_end(tmp_path: Path) -> None:
    watch = start(tmp_path / "o.run")
    assert load_record(tmp_path / "o.run").runs[0].state == "running"
    watch.counts = Counts(answered=4, failed=1, total=5, failures={"invalid_json": 1}, seconds=2.5)
    watch.close("finished")
    watch.close("failed", "too late")
    (run,) = load_record(tmp_path / "o.run").runs
    assert (run.state, run.rows_answered, run.rows_failed, run.rows_total) == ("finished", 4, 1, 5)
    assert run.failures == {"invalid_json": 1}
    assert run.history == HISTORY
    assert run.transitions == list(stats().transitions)
    assert (run.transition_count, run.transition_bytes) == (1, 3 << 20)
    assert run.stats == replace(stats(), transitions=())
    assert run.timeline and run.timeline[-1].phase == "decode"
    assert [p.name for p in (tmp_path / "o.run").iterdir()] == ["run.json"]


def test_it_is_written_while_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_WRITE_SECONDS", 0.0)
    watch = start(tmp_path / "o.run")
    deadline = time.monotonic() + 20
    while not load_record(tmp_path / "o.run").runs[0].timeline and time.monotonic() < deadline:
        time.sleep(0.01)
    (run,) = load_record(tmp_path / "o.run").runs
    assert (run.state, run.plans[0][1]) == ("running", "P2->T2")
    watch.close("finished")


def test_a_job_that_goes_on_adds_its_sitting(tmp_path: Path) -> None:
    for state in ("interrupted", "failed", "finished"):
        start(tmp_path / "o.run").close(state)
    assert [r.state for r in load_record(tmp_path / "o.run").runs] == ["interrupted", "failed", "finished"]
    start(tmp_path / "o.run").close("interrupted")  # the job before is done: this is another one
    assert [r.state for r in load_record(tmp_path / "o.run").runs] == ["interrupted"]
    start(tmp_path / "o.run", new_run(COMMAND | {"input": ["other.jsonl"]})).close("finished")
    assert [r.state for r in load_record(tmp_path / "o.run").runs] == ["finished"]


def test_a_record_of_a_long_job_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(recorder, "_SAMPLES", 20)
    watch = start(tmp_path / "o.run")
    while watch._samples.every < 8:
        time.sleep(0.005)
    watch.close("finished")
    assert len(load_record(tmp_path / "o.run").runs[0].timeline) <= 20


def test_a_record_that_is_no_record_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "o.run").mkdir()
    (tmp_path / "o.run" / "run.json").write_text("{]")
    with pytest.raises(ConfigError, match=r"run.json: is not the record of a run"):
        load_record(tmp_path / "o.run")
    with caplog.at_level(logging.WARNING):
        start(tmp_path / "o.run").close("finished")
    assert "it is replaced" in caplog.text
    assert load_record(tmp_path / "o.run").runs[0].state == "finished"


def test_a_folder_that_goes_away_does_not_disturb_the_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    watch = start(tmp_path / "there" / "o.run")
    shutil.rmtree(tmp_path / "there")
    with caplog.at_level(logging.WARNING):
        watch.close("finished")
    assert "the run is not recorded in" in caplog.text


def test_transition_records_of_a_killed_job_count_in_full(tmp_path: Path) -> None:
    many = tuple(TransitionRecord("T2", 10, 0.1, "delta", at=float(i)) for i in range(5000))
    watch = RunRecorder(
        tmp_path / "o.run",
        new_run(COMMAND),
        stats=lambda: replace(stats(), transitions=many),
        history=lambda: HISTORY,
        setup=lambda: None,
    )
    watch.close("finished")
    (run,) = load_record(tmp_path / "o.run").runs
    assert (run.transition_count, run.transition_bytes) == (5000, 50000)
    assert len(run.transitions) <= 2000
