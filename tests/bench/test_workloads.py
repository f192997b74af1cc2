from __future__ import annotations

import json
from pathlib import Path

import pytest

from seesaw.bench.contestant import weight_parameters
from seesaw.bench.shapes import SHAPES, model_directory
from seesaw.bench.workloads import FIRST_TOKEN, Workload, parse_workload
from seesaw.core.errors import ConfigError
from seesaw.core.layout import Layout
from seesaw.models.hf_config import load_spec
from seesaw.weights.sharding import make_sharding, weight_bytes


@pytest.mark.parametrize(
    ("text", "count", "lengths"),
    [
        ("short", 32, (512, 64)),
        ("prefill", 64, (1024, 16)),
        ("decode", 64, (64, 256)),
        ("3x5->7", 3, (5, 7)),
        (" 3×5→7 ", 3, (5, 7)),
    ],
)
def test_uniform_workloads(text: str, count: int, lengths: tuple[int, int]) -> None:
    assert parse_workload(text).lengths == (lengths,) * count


@pytest.mark.parametrize(("scale", "count"), [(0.25, 8), (2, 64), (0.001, 1), (0.3, 10)])
def test_scale_is_of_the_requests(scale: float, count: int) -> None:
    workload = parse_workload("short", scale)
    assert len(workload.lengths) == count
    assert workload.lengths[0] == (512, 64)


def test_sharegpt_keeps_its_limit_and_its_order() -> None:
    whole, some = parse_workload("sharegpt:1500x512"), parse_workload("sharegpt:20x512")
    assert len(whole.lengths) == 1500
    assert whole.lengths[:20] == some.lengths
    assert whole.lengths[1000:] == whole.lengths[:500]  # from the start again
    assert 480 < whole.longest <= 512
    assert min(min(pair) for pair in whole.lengths) >= 1
    assert len(set(whole.lengths)) > 500
    default = parse_workload("sharegpt")
    assert len(default.lengths) == 64
    assert default.longest <= 1024


@pytest.mark.parametrize(
    "text", ["", "fast", "0x1->1", "3x5", "3x5->0", "sharegpt:0", "sharegpt:5x9999", "sharegpt:x"]
)
def test_what_is_no_workload(text: str) -> None:
    with pytest.raises(ConfigError, match="workload"):
        parse_workload(text)
    with pytest.raises(ConfigError, match="scale"):
        parse_workload("short", 0)


def test_prompts_come_from_the_seed() -> None:
    workload = Workload("w", ((4, 2), (9, 1)))
    prompts = workload.prompts(100)
    assert [len(p) for p in prompts] == [4, 9]
    assert workload.prompts(100) == prompts
    assert workload.prompts(100, seed=1) != prompts
    assert all(FIRST_TOKEN <= t < 100 for p in prompts for t in p)
    assert (workload.prompt_tokens, workload.output_tokens, workload.longest) == (13, 3, 10)


def test_the_warm_up_is_a_few_short_requests() -> None:
    sample = Workload("w", ((4, 20), (9, 3), (5, 5))).sample(2, 8)
    assert sample.lengths == ((4, 8), (9, 3))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_become_models(name: str, tmp_path: Path) -> None:
    spec, shape = load_spec(str(model_directory(name, tmp_path))), SHAPES[name]
    assert (spec.hidden, spec.ffn, spec.layers, spec.heads) == (
        shape.hidden,
        shape.ffn,
        shape.layers,
        shape.heads,
    )
    assert (spec.kv_heads, spec.head_dim, spec.vocab) == (shape.kv_heads, 64, 32000)
    assert spec.dtype == "bfloat16"
    whole = make_sharding(spec, Layout(), head_weight=0.0)
    assert 2 * weight_parameters(spec) == pytest.approx(weight_bytes(spec, whole, 0, "bfloat16"), rel=1e-3)


def test_a_directory_may_be_the_shape(tmp_path: Path) -> None:
    made = model_directory("tiny", tmp_path / "made")
    assert json.loads((made / "config.json").read_text())["hidden_size"] == 256
    assert model_directory(str(made), tmp_path / "unused") == made
    with pytest.raises(ConfigError, match="shape 'huge': choose one of tiny, 270m"):
        model_directory("huge", tmp_path / "unused")
