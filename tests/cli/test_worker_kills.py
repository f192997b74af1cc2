"""Workers are killed while a job runs: the same command ends it, with every row once and the same answers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.small_job import ROWS, write_job
from tests.jobs.contract import read

SERVER = "seesaw.execution.fork_server"


def command(folder: Path, output: Path, plan: str) -> list[str]:
    options = (
        f"--plan {plan} --load-format dummy --dtype float32 --device-memory 4MiB --host-kv 1MiB --chunk 32 "
        "--max-running 16 --max-model-len 128 --preflight off"
    )
    files = ["--model", str(folder), "--input", str(folder / "rows.jsonl"), "--output", str(output)]
    return [sys.executable, "-m", "seesaw", "run", *files, *options.split()]


def answers(path: Path) -> dict[str, Any]:
    """Text, reason and usage by id; each id must come once."""
    lines = read(path)
    found = {
        line["custom_id"]: (line["response"]["body"]["choices"], line["response"]["body"]["usage"])
        for line in lines
    }
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> dict[str, Any]:
    subprocess.run(command(job, job / "calm.jsonl", "P2->T2"), check=True, capture_output=True)
    found = answers(job / "calm.jsonl")
    assert len(found) == ROWS
    return found


def workers(control: int) -> list[psutil.Process]:
    """The ranks of a running command."""
    try:
        servers = [p for p in psutil.Process(control).children() if SERVER in " ".join(p.cmdline())]
        return [rank for server in servers for rank in server.children()]
    except psutil.Error:
        return []


def run_with_kills(job: Path, output: Path, plan: str, rng: random.Random, kills: int) -> tuple[int, str]:
    """Run the command, killing ranks at moments of chance; returns how many were killed, and what it said."""
    log = output.with_suffix(".log")
    killed = 0
    with log.open("w") as out:
        control = subprocess.Popen(command(job, output, plan), stdout=out, stderr=subprocess.STDOUT)
        while control.poll() is None:
            ranks = workers(control.pid)
            if killed < kills and ranks:
                time.sleep(rng.uniform(0.0, 1.0))
                victim = rng.choice(ranks)
                if victim.is_running() and control.poll() is None:
                    victim.kill()
                    killed += 1
                    time.sleep(0.3)
            time.sleep(0.02)
    return killed, log.read_text() + f"\nexit code {control.returncode}"


def check(job: Path, tmp_path: Path, plan: str, kills: int, seed: int, undisturbed: dict[str, Any]) -> int:
    output = tmp_path / "out.jsonl"
    killed, said = run_with_kills(job, output, plan, random.Random(seed), kills)
    assert output.exists(), said
    assert answers(output) == undisturbed, said
    assert not output.with_name("out.errors.jsonl").exists()
    return killed


def test_killed_workers(job: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    check(job, tmp_path, "P4->T4", 2, 7, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("plan", "kills"), [("P2->T2", 1), ("D2->T2", 1), ("P4->T4", 2), ("D2P2->T4", 3)])
def test_forty_killed_workers(
    plan: str, kills: int, job: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    killed, seed = 0, 0
    while killed < 10:
        folder = tmp_path / str(seed)
        os.mkdir(folder)
        killed += check(job, folder, plan, kills, seed, undisturbed)
        seed += 1
        assert seed < 40
