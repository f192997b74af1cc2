"""Preflight of whole jobs: the engine gets a transport that works; errors are one sentence; odd mounts."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seesaw import LLM, SamplingParams
from seesaw.cli.main import app
from seesaw.core.errors import ConfigError
from seesaw.preflight import communication
from tests.checkpoints import make_checkpoint
from tests.jobs.contract import read
from tests.test_text import save

FAULTS = "tests.preflight.faults:"
ENGINE = ("--device-memory", "16MiB", "--host-kv", "1MiB", "--max-model-len", "200", "--dtype", "float32")
ROWS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=420, eos_token_id=2)
    save(path, "byte-level")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [{"id": f"row-{i}", "prompt": f"go {i}", "max_tokens": 3} for i in range(ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def no_leader_stays() -> Iterator[None]:
    yield
    assert not communication._early
    communication.discard_early()


def break_transports(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real = communication.find_connection
    monkeypatch.setattr(
        communication, "find_connection", functools.partial(real, wrapper=FAULTS + fault, limit=60.0)
    )


def test_the_engine_runs_over_what_works(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_transports(monkeypatch, "corrupt_shm")
    options = {"plan": "P2->T2", "device_memory": "16MiB", "host_kv": "1MiB", "dtype": "float32"}
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with caplog.at_level("INFO", logger="seesaw"), LLM(model, **options, preflight="on") as llm:
        assert llm.deployment.options.transport == "tcp"
        assert [place.address for place in llm.deployment.places] == ["127.0.0.1"] * 2
        found = llm.generate(["one", "two"], greedy)
    assert "going on with 'tcp'" in caplog.text and "correctly over 'tcp'" in caplog.text
    with LLM(model, **options) as llm:
        expected = llm.generate(["one", "two"], greedy)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.slow
def test_a_job_without_a_transport_does_not_start(
    model: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_transports(monkeypatch, "corrupt_all")
    line = ["run", "--model", str(model), "--input", str(source), "--plan", "P2->T2", *ENGINE]
    result = CliRunner().invoke(app, [*line, "--preflight", "on"])
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: preflight: no transport connects the 2 ranks: transport 'shm' failed: ")
    assert last.endswith("--preflight off goes ahead regardless")
    assert not source.with_name("in.output.jsonl").exists()


def test_an_unknown_mode_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="preflight 'maybe': choose one of off, limits, on"):
        LLM(model, preflight="maybe")


# ---- mounts of one's own -----------------------------------------------------------------------------------

MOUNTS = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "mounting needs root"
    try:
        allowed = subprocess.run([*MOUNTS, "mount -t tmpfs none /dev/shm"], capture_output=True, check=False)
    except FileNotFoundError:
        return "there is no unshare(1)"
    return None if allowed.returncode == 0 else "mount namespaces cannot be made here"


REASON = why_not()
needs_mounts = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def run_with(mount: str, model: Path, source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`seesaw run` behind mounts that it alone has."""
    line = [sys.executable, "-m", "seesaw", "run", "--model", str(model), "--input", str(source)]
    script = f'{mount}; exec "$@"'
    return subprocess.run(
        [*MOUNTS, script, "sh", *line, *ENGINE, *options], capture_output=True, text=True, check=False
    )


@needs_mounts
@pytest.mark.parametrize(
    ("plan", "size"),
    [("P2->T2", "64m"), pytest.param("T2", "4k", marks=pytest.mark.slow)],
)
def test_a_small_dev_shm_does_not_matter(plan: str, size: str, model: Path, source: Path) -> None:
    mount = f"mount -t tmpfs -o size={size} none /dev/shm"
    result = run_with(mount, model, source, "--plan", plan, "--preflight", "on", "--host-kv", "80MiB")
    assert result.returncode == 0, result.stderr
    assert len(read(source.with_name("in.output.jsonl"))) == ROWS
    assert "2 ranks exchange data correctly over 'shm'" in result.stderr


@needs_mounts
def test_a_disk_that_is_surely_too_small(model: Path, source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=4k none {small}"
    result = run_with(mount, model, source, "--plan", "T1", "--output", str(small / "out.jsonl"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: preflight: disk: {ROWS} rows take at least 6.09 KiB at {small}/out.jsonl, and {small} has "
        "4.00 KiB free; free some space, or write elsewhere with --output"
    ]


@needs_mounts
def test_a_read_only_disk(model: Path, source: Path, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    mount = f"mount -t tmpfs -o ro none {frozen}"
    result = run_with(mount, model, source, "--plan", "T1", "--output", str(frozen / "out.jsonl"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and str(frozen) in result.stderr
