from __future__ import annotations

from pathlib import Path

import pytest

from seesaw.bench.contestant import (
    Contestant,
    deployment_of,
    parse_contestant,
    parse_contestants,
    prepared,
)
from seesaw.bench.results import group
from seesaw.bench.shapes import model_directory
from seesaw.bench.workloads import parse_workload
from seesaw.core.errors import ConfigError
from seesaw.models.hf_config import load_spec


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("P2->T2", {"plan": "P2->T2"}),
        ("P2→T2", {"plan": "P2->T2"}),
        ("T2:chunked", {"plan": "T2", "policy": "chunked"}),
        ("T2@policy=chunked,chunk=512", {"plan": "T2", "policy": "chunked", "chunk": 512}),
        (
            "D2@device_memory=1GiB,overlap=false,max_running=8",
            {"plan": "D2", "device_memory": "1GiB", "overlap": False, "max_running": 8},
        ),
    ],
)
def test_plans_with_options(text: str, options: dict[str, object]) -> None:
    contestant = parse_contestant(text)
    assert contestant.options == options
    assert contestant.name == text.replace("→", "->")
    assert contestant.kind == "seesaw"


def test_the_planner_may_choose() -> None:
    asked, own = parse_contestants("auto@ranks=4,policy=seesaw auto")
    assert asked.planned and asked.plan is None and asked.world == 4 and group(asked) == "auto"
    assert asked.options == {"plan": "auto", "ranks": 4, "policy": "seesaw"}
    assert own.world >= 1 and not parse_contestants("T2")[0].planned


def test_vllm_stands_for_its_layouts(python: Path) -> None:
    found = parse_contestants("T2 vllm@dtype=float32 vllm:TP4", python)
    assert [one.name for one in found] == [
        "T2",
        "vllm:TP1@dtype=float32",
        "vllm:TP2@dtype=float32",
        "vllm:PP2@dtype=float32",
        "vllm:TP4",
    ]
    assert found[2].options == {"layout": "TP2", "dtype": "float32"}
    assert found[2].command[0] == str(python)
    assert Path(found[2].command[1]).is_file()
    assert [one.world for one in found] == [2, 1, 2, 2, 4]
    assert [group(one) for one in parse_contestants("P2->T2 T2->T2 T2 vllm:TP1", python)] == [
        "resharded",
        "static",
        "static",
        "vllm",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("X2", "layout 'X2'"),
        ("T2@chunks=5", "unknown option 'chunks'"),
        ("T2@plan=T4", "unknown option 'plan'"),
        ("T2@chunk", "'chunk' is not option=value"),
        ("vllm:T2", "TP1, TP2 or PP2"),
        ("vllm:TP2@chunk=5", "unknown option 'chunk'"),
    ],
)
def test_what_is_no_contestant(text: str, said: str, python: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_contestant(text, python)


def test_vllm_needs_its_environment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"setup\.sh"):
        parse_contestant("vllm:TP1", tmp_path / "none" / "python")


def test_what_the_bench_sets_unless_the_contestant_does(tmp_path: Path, python: Path) -> None:
    model = model_directory("tiny", tmp_path)
    spec, workload = load_spec(str(model)), parse_workload("6x100->20")
    ready = prepared(parse_contestant("P2->T2"), spec, workload, dtype="bfloat16")
    memory = deployment_of(ready, model).memory
    assert memory.max_model_len == ready.options["max_model_len"] == 128
    assert min(memory.device_blocks) * 16 >= 6 * 121  # all requests at once
    assert memory.host_blocks * 16 >= 6 * 121
    assert "node" not in ready.options
    own = parse_contestant("T2@device_memory=40MiB,dtype=float32,max_model_len=200")
    ready = prepared(own, spec, workload, dtype="bfloat16", device_memory="1GiB", host_kv="3MiB", node="n")
    assert {**own.options, "host_kv": "3MiB", "node": "n", "device": "cpu"} == ready.options
    assert ready.memory == 2 * (40 << 20) + (3 << 20)
    peer = prepared(parse_contestant("vllm:TP2", python), spec, workload, dtype="bfloat16", node="n")
    assert 6 * 128 * spec.kv_bytes_per_token("bfloat16") / 2 < peer.options["kv_memory"] < 1 << 27
    assert {**peer.options, "kv_memory": 0} == {
        "layout": "TP2",
        "dtype": "bfloat16",
        "max_model_len": 128,
        "kv_memory": 0,
    }
    own = prepared(parse_contestant("vllm:TP1@kv_memory=2GiB", python), spec, workload, dtype="bfloat16")
    assert own.options["kv_memory"] == 2 << 30 < own.memory < 3 << 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("P9", "P9"),
        ("T2@device_memory=1MiB", "device memory"),
        ("P2->T2:chunked", "policy chunked"),
        ("T2:lazy", "policy 'lazy'"),
        ("T2@block_size=0", "block_size=0"),
    ],
)
def test_what_the_engine_would_refuse_is_refused_first(text: str, said: str, tmp_path: Path) -> None:
    model = model_directory("tiny", tmp_path)
    contestant: Contestant = prepared(
        parse_contestant(text), load_spec(str(model)), parse_workload("2x8->2"), dtype="bfloat16"
    )
    with pytest.raises(ConfigError, match=said) as caught:
        deployment_of(contestant, model)
    assert text in str(caught.value)
