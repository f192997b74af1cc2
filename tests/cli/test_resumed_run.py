"""`seesaw run` a second time: what it says, what it runs, with which code it exits."""

# ruff: noqa: F401, F811  (fixtures come by import)
from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from seesaw.core.errors import JobError, WorkerError
from seesaw.jobs.disk import DISK, Disk
from seesaw.jobs.journal import Kind
from seesaw.jobs.store import StreamStore
from tests.cli.test_run import Invoke, engine, invoke
from tests.jobs.contract import read
from tests.jobs.echo_engine import EchoEngine

ROWS = 20


@pytest.fixture
def rows(tmp_path: Path, invoke: Invoke) -> Path:
    """An input of 20 rows, of which the fourth fails."""
    path = tmp_path / "in.jsonl"
    prompts = ["" if i == 3 else f"prompt {i}" for i in range(ROWS)]
    path.write_text("".join(json.dumps({"id": f"r{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts)))
    return path


@pytest.mark.parametrize("cause", ["Ctrl-C", "a worker"])
def test_the_same_command_goes_on(cause: str, rows: Path, invoke: Invoke, engine: EchoEngine) -> None:
    engine.fail_after = 8
    if cause == "a worker":
        engine.error = WorkerError("rank 1 died", rank=1, phase="decode")
    first = invoke()
    assert first.exit_code == 3
    assert "9 rows are safe in" in first.stderr and "the same command goes on from there" in first.stderr
    ran, engine.fail_after = len(engine.requests), None
    second = invoke()
    assert second.exit_code == 1
    assert "9 rows were done before; the job goes on" in second.stderr
    assert "19 answered, 1 failed (of which 9 from before)" in second.stdout
    assert len(engine.requests) == ran + 11
    third = invoke()
    assert (third.exit_code, third.stdout) == (1, "")
    output = rows.with_name("in.output.jsonl")
    errors = rows.with_name("in.output.errors.jsonl")
    assert third.stderr == (
        f"{output}: complete, 19 rows answered, 1 failed ({errors}); --retry-errors runs these again\n"
    )
    assert len(read(output)) == 19 and len(read(errors)) == 1


def test_another_command_is_refused_before_the_engine_starts(
    rows: Path,
    invoke: Invoke,
    engine: EchoEngine,
) -> None:
    engine.fail_after = 8
    invoke()
    del engine.opened  # type: ignore[attr-defined]
    result = invoke("--seed", "5", "--max-model-len", "70")
    assert result.exit_code == 2
    assert "--seed is 5, was 0; --max-model-len is 70, was not given" in result.stderr
    assert "--force to go on regardless" in result.stderr
    assert not hasattr(engine, "opened")
    engine.fail_after = None
    assert invoke("--seed", "5", "--force", "--plan", "T2", "--host-kv", "1MiB").exit_code == 1


def test_failed_rows_again(rows: Path, invoke: Invoke, engine: EchoEngine) -> None:
    assert invoke("--ordered").exit_code == 1
    ran = len(engine.requests)
    assert [line["custom_id"] for line in read(rows.with_name("in.output.jsonl"))] == [
        f"r{i}" for i in range(ROWS) if i != 3
    ]
    assert invoke("--retry-errors").exit_code == 1
    assert len(engine.requests) == ran  # the row fails before it becomes a request
    assert len(read(rows.with_name("in.output.errors.jsonl"))) == 1
    assert len(read(rows.with_name("in.output.jsonl"))) == 19


def test_standard_output(rows: Path, invoke: Invoke) -> None:
    result = invoke("--output", "-")
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{i}" for i in range(ROWS))
    assert "19 answered, 1 failed" in result.stderr
    assert os.listdir(rows.parent) == ["in.jsonl"]


def test_standard_output_that_is_closed(rows: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: StreamStore, kind: Kind, number: int, digest: int, line: bytes) -> None:
        raise JobError("standard output: cannot be written (Broken pipe)")

    monkeypatch.setattr(StreamStore, "add", add)
    result = invoke("--output", "-")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: standard output: cannot be written (Broken pipe)\n")


def test_a_full_disk(rows: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Disk, descriptor: int, data: bytes, offset: int) -> None:
        if len(data) > 4000:  # the first group of lines
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(type(DISK), "write", write)
        result = invoke()
    assert result.exit_code == 3
    part = rows.with_name("in.output.jsonl.part")
    assert result.stderr == (
        f"error: {part}: cannot be written (No space left on device); make room there\n"
        f"0 rows are safe in {part}; the same command goes on from there\n"
    )
    assert invoke().exit_code == 1
    assert len(read(rows.with_name("in.output.jsonl"))) == 19
