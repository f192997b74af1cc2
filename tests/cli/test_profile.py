"""`seesaw profile`: what it writes, what it shows, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from seesaw.cli.main import app
from seesaw.core.hardware import HardwareSpec, TypeCurves
from seesaw.device.gpus import Gpu
from seesaw.planning.profiles import load_profile
from tests.planning.machines import FLAT, hardware

CURVES = TypeCurves(product=FLAT, prefill_attention=FLAT, decode_attention=FLAT)
asked: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(places: Any, dtypes: Any, box: Any, options: Any, **others: Any) -> HardwareSpec:
        asked.update(
            places=places, dtypes=dtypes, threads=options.threads, box=box, options=options, **others
        )
        others["progress"](0, 1, "product")
        return hardware(name=box.name, ranks=len(places), by_type=dict.fromkeys(dtypes, CURVES))

    monkeypatch.setattr("seesaw.profiling.measure.profile", measure)
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "profile.json"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_the_profile_is_written_where_the_planner_looks(tmp_path: Path) -> None:
    result = run("--ranks", "2")
    assert result.exit_code == 0, result.output
    assert load_profile(tmp_path / "profile.json").ranks == 2
    assert asked["dtypes"] == ["bfloat16", "float32"] and asked["threads"] == 1
    assert "all-reduce of 2" in result.output and str(tmp_path / "profile.json") in result.output
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_types_and_output_may_be_named(tmp_path: Path) -> None:
    assert run("--dtype", "float32,bfloat16", "--output", str(tmp_path / "a" / "b.json")).exit_code == 0
    assert asked["dtypes"] == ["float32", "bfloat16"]
    assert load_profile(tmp_path / "a" / "b.json").device == "cpu"


def test_a_node_file_places_the_ranks(tmp_path: Path) -> None:
    node = tmp_path / "node.json"
    node.write_text(json.dumps({"ranks": [{"cores": [0]}, {"cores": [1]}, {"cores": [0]}]}))
    assert run("--node", str(node)).exit_code == 0
    assert [place.cores for place in asked["places"]] == [[0], [1], [0]]
    result = run("--node", str(node), "--ranks", "4")
    assert result.exit_code == 2 and "has places for 3" in result.output


GIB = 1 << 30
L4 = Gpu("NVIDIA L4", 24 * GIB, 22 * GIB)


def gpus(monkeypatch: pytest.MonkeyPatch, *found: Gpu) -> None:
    monkeypatch.setattr("seesaw.device.gpus.require_cuda_build", lambda: None)
    monkeypatch.setattr("seesaw.device.gpus.visible_gpus", lambda: list(found))


def test_a_rank_on_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, L4, L4, Gpu("NVIDIA L4", 23 * GIB, 22 * GIB))
    assert run("--device", "cuda").exit_code == 0
    assert len(asked["places"]) == 3
    assert (asked["box"].name, asked["box"].memory) == ("NVIDIA L4", 23 * GIB)
    assert asked["options"].device == "cuda" and asked["options"].memory == 2 * GIB
    assert asked["effort"].passes == 3
    node = tmp_path / "node.json"
    node.write_text(json.dumps({"ranks": [{"cores": [0], "device": 2}, {"cores": [1], "device": 0}]}))
    assert run("--device", "cuda", "--node", str(node)).exit_code == 0
    assert [place.device for place in asked["places"]] == [2, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "3 ranks, each on a GPU of its own, and 2 visible; use --ranks 2, or fewer"),
        (["--ranks", "2"], "3.00 GiB are free on GPU 1 (NVIDIA L4), 7.00 GiB are needed"),
    ],
)
def test_gpus_that_cannot_be_measured_are_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, L4, Gpu("NVIDIA L4", 24 * GIB, 3 * GIB))
    result = run("--device", "cuda", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert run("--device", "cuda", "--ranks", "1").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int3"], "--dtype 'int3': choose from"),
        (["--dtype", ","], "name at least one type"),
        (["--device", "tpu"], "device 'tpu': 'cpu' and 'cuda' are supported"),
        (["--node", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
