"""What ranks wrote about their functions, as means and as a table."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from seesaw.bench.contestant import Contestant
from seesaw.bench.profiles import REST, read_profiles
from seesaw.bench.results import Entry, WorkloadResult
from seesaw.bench.tables import INDENT, workload_tables
from seesaw.bench.workloads import Workload
from seesaw.execution.profiling import FunctionTime, PhaseProfile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank, attend in enumerate((0.2, 0.4)):
        functions = {
            "linear 8x4": FunctionTime(calls=8, seconds=1.0),
            "attend": FunctionTime(calls=4, seconds=attend),
            "rotate": FunctionTime(calls=4, seconds=0.001),
        }
        profile = {
            "decode": PhaseProfile(forwards=4, tokens=64, seconds=2.0, functions=functions),
            "prefill": PhaseProfile(),
        }
        (tmp_path / f"rank{rank}.json").write_bytes(msgspec.json.encode(profile))
    return tmp_path


def test_means_over_ranks_and_forwards(folder: Path) -> None:
    profiles = read_profiles(folder)
    assert list(profiles) == ["decode"]  # a phase that did not run is left out
    decode = profiles["decode"]
    assert (decode.forwards, decode.tokens, decode.seconds) == (4, 16.0, 0.5)
    assert decode.functions == pytest.approx(
        {"linear 8x4": 0.25, "attend": 0.075, "rotate": 0.00025, REST: 0.17475}
    )
    assert list(decode.functions)[-1] == REST


def test_nothing_written_is_nothing_read(tmp_path: Path) -> None:
    assert read_profiles(tmp_path) == {}


def test_small_functions_are_shown_together(folder: Path) -> None:
    entry = Entry(contestant=Contestant(name="T2", kind="seesaw", command=(), options={"plan": "T2"}))
    entry.profile = read_profiles(folder)
    table = workload_tables(WorkloadResult(workload=Workload("w", ((1, 1),)), entries=[entry]), None)[-1]
    assert table.rows == [
        ["T2, decode", "500.00", "100%"],
        [f"{INDENT}linear 8x4", "250.00", "50.0%"],
        [f"{INDENT}attend", "75.00", "15.0%"],
        [f"{INDENT}others", "0.25", "0.1%"],
        [f"{INDENT}{REST}", "174.75", "35.0%"],
    ]
    assert table.notes == ["T2, decode: a step of 16 tokens, the mean of 4"]
