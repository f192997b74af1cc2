"""The benchmarks of kernels alone run, on one core and on several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seesaw.native.build import load

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LINEAR = ["linear.py", "--shapes", "64x64", "--rows", "1", "300"]
ATTENTION = ["attention.py", "--batches", "2x40+1", "1x0+20", "--heads", "2/1x64"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    script, *rest = arguments
    command = [sys.executable, str(FOLDER / script), "--types", "float32", "--seconds", "0.01", *rest]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(load() is None, reason="no native library")
@pytest.mark.parametrize("arguments", [LINEAR, ATTENTION], ids=lambda arguments: arguments[0])
def test_every_cell_is_measured_on_all_cores(arguments: list[str]) -> None:
    cores = min(2, len(os.sched_getaffinity(0)))
    found = run(*arguments, "--cores", str(cores))
    assert found.returncode == 0, found.stderr
    bounds, head, *cells = found.stdout.splitlines()
    assert "GFLOP/s" in bounds and head.startswith("type")
    assert len(cells) == 2
    assert all(float(number) > 0 for line in cells for number in line.replace("*", "").split()[-4:])


@pytest.mark.skipif(load() is None, reason="no native library")
def test_too_many_cores_and_what_fails_in_a_process_end_the_program() -> None:
    assert "--cores 9999: this process may use 1 to" in run(*LINEAR, "--cores", "9999").stderr
    refused = run("linear.py", "--shapes", "0x64", "--rows", "1")
    assert refused.returncode == 1
    assert "a process that measures has ended" in refused.stderr
