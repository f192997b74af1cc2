from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from seesaw.core.errors import ConfigError, ModelError
from seesaw.core.moe import MoESpec
from seesaw.models.hf_config import load_spec
from seesaw.models.parameters import parameter_count
from seesaw.planning.shapes import PlannedModel, shape, shape_names

PUBLISHED = {
    "Llama-2-7B": 6.738,
    "Llama-2-13B": 13.016,
    "Llama-2-70B": 68.977,
    "CodeLlama-34B": 33.744,
    "Llama-3-8B": 8.030,
    "Llama-3-15B": 15.0,
    "Llama-3-70B": 70.554,
    "Llama-3.1-8B": 8.030,
    "Llama-3.1-70B": 70.554,
    "Llama-3.1-405B": 405.853,
    "Mistral-7B": 7.248,
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
    "Mixtral-8x7B": 46.703,
    "Mixtral-8x22B": 140.6,
    "Qwen3-30B-A3B": 30.532,
    "Qwen3-235B-A22B": 235.094,
}
"""Billions of parameters."""

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", shape_names())
def test_named_shapes_have_their_published_size(name: str) -> None:
    assert shape(name).parameters() / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "active"),
    [("Mixtral-8x7B", 12.9), ("Mixtral-8x22B", 39.15), ("Qwen3-30B-A3B", 3.35), ("Qwen3-235B-A22B", 22.2)],
)
def test_active_parameters_are_those_of_the_model_cards(name: str, active: float) -> None:
    assert shape(name).active_parameters() / 1e9 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("Llama-2-7B", 512),
        ("Llama-3-15B", 256),
        ("Llama-3.1-8B", 128),
        ("Llama-3.1-70B", 320),
        ("Qwen3-32B", 256),
    ],
)
def test_kv_of_a_token(name: str, kv: int) -> None:
    assert shape(name).kv_bytes_per_token() == kv * 1024
    assert shape(name, kv="fp8").kv_bytes_per_token() == kv * 512
    assert shape(name).kv_bytes_per_token() == shape(name).spec.kv_bytes_per_token("bfloat16")


@pytest.mark.parametrize(
    "written",
    [
        "llama-3.1-8b",
        "LLAMA-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B",
        "Llama3.1_8B",
    ],
)
def test_names_are_those_of_the_hub_in_any_case(written: str) -> None:
    assert shape(written) is shape("Llama-3.1-8B")


def test_aliases() -> None:
    assert shape("Llama-3.3-70B-Instruct").name == "Llama-3.1-70B"
    assert shape("mistralai/Mixtral-8x7B-Instruct-v0.1").name == "Mixtral-8x7B"
    assert shape("meta-llama/Llama-2-70b-chat-hf").name == "Llama-2-70B"


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-3-71b'.*near names are .*Llama-3-70B"):
        shape("llama-3-71b")
    with pytest.raises(ConfigError, match=r"known are .*Qwen3-235B-A22B"):
        shape("@@@@")


def test_types_replace_those_of_the_model() -> None:
    model = shape("Llama-3.1-70B", weights="INT4", kv="fp16")
    assert model.weight_bits == pytest.approx(4.16, rel=0.001)
    # 80 layers of 8192 x (8192 + 2 * 1024 + 8192 + 3 * 28672) in 4.16 bits, the rest in 16
    quantised = 80 * 8192 * (8192 + 2 * 1024 + 8192 + 3 * 28672)
    rest = 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    assert model.weight_bytes() == round(quantised * model.weight_bits / 8 + 2 * rest)
    assert shape("Llama-3.1-70B").weight_bytes() == 2 * shape("Llama-3.1-70B").parameters()
    experts = shape("Mixtral-8x7B", weights="fp8")
    sparse = 32 * 4096 * (4096 + 2 * 1024 + 4096 + 8 * 3 * 14336)
    assert experts.weight_bytes() == 2 * experts.parameters() - sparse
    with pytest.raises(ConfigError, match=r"weights='int3': choose one of .*int4"):
        shape("Llama-3.1-70B", weights="int3")
    with pytest.raises(ConfigError, match=r"kv='int4': choose one of"):
        shape("Llama-3.1-70B", kv="int4")


def test_touched_parameters_grow_from_active_to_all() -> None:
    model = shape("Qwen3-235B-A22B")
    spec = model.spec
    embedding = spec.vocab * spec.hidden
    assert model.touched_parameters(1) == pytest.approx(model.active_parameters() - embedding + spec.hidden)
    steps = [model.touched_parameters(tokens) for tokens in (1, 2, 8, 64, 512, 4096)]
    assert steps == sorted(steps)
    assert model.touched_parameters(1 << 20) == pytest.approx(model.parameters())
    layers = [model.touched_in_layer(layer, 64) for layer in range(spec.layers)]
    assert sum(layers) == pytest.approx(model.touched_parameters(64) - embedding - 65 * spec.hidden)
    assert sum(model.layer_parameters(i) for i in range(spec.layers)) == (
        model.parameters() - 2 * embedding - spec.hidden
    )


def test_a_dense_model_touches_everything_but_rows_of_its_embedding() -> None:
    model = shape("Llama-3.1-8B")
    rows = model.spec.vocab - 7
    assert model.touched_parameters(7) == model.parameters() - rows * model.spec.hidden
    tied = shape("Qwen3-0.6B")
    assert tied.touched_parameters(7) == tied.parameters() == parameter_count(tied.spec)


def test_expected_experts_by_enumeration() -> None:
    moe = MoESpec(experts=3, experts_per_token=2, expert_ffn=8, sparse=(0,))
    pairs = [{0, 1}, {0, 2}, {1, 2}]
    drawn = [len(a | b) for a in pairs for b in pairs]
    assert moe.expected_experts(2) == pytest.approx(sum(drawn) / len(drawn))
    assert moe.expected_experts(0) == 0
    assert moe.expected_experts(1) == pytest.approx(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"experts_per_token": 4},
        {"experts_per_token": 0},
        {"sparse": ()},
        {"sparse": (1, 1)},
        {"sparse": (-1,)},
    ],
)
def test_impossible_experts(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MoESpec(**{"experts": 3, "experts_per_token": 2, "expert_ffn": 8, "sparse": (0,), **fields})


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_directories_have_the_parameters_of_transformers(
    family: str, tied: bool, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(family, **TINY, **SPARSE[family], tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path / "model")
    planned = shape(tmp_path / "model")
    assert planned.name == "model"
    assert planned.parameters() == model.num_parameters()
    assert planned.moe is not None
    assert (
        planned.moe.sparse == {"mixtral": (0, 1, 2, 3), "qwen3_moe": (0, 2, 3), "qwen2_moe": (1, 3)}[family]
    )


def test_dense_directories_are_read_as_the_engine_reads_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "llama", {"model_type": "llama", **TINY})
    planned = shape(str(folder))
    assert planned == PlannedModel(name="llama", spec=load_spec(folder))
    write(folder, {"model_type": "llama", **TINY, "torch_dtype": "float32"})
    assert (shape(folder).weight_bits, shape(folder).kv_bits) == (32, 32)
    write(folder, {"model_type": "llama", **TINY, "hidden_act": "gelu"})
    with pytest.raises(ModelError, match="hidden_act"):
        shape(folder)


def test_a_directory_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "Qwen3-8B", {"model_type": "llama", **TINY})
    assert shape("Qwen3-8B").spec.layers == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no such file"):
        shape("empty")


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4.15625),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 4.3125),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
            },
            4.125,
        ),
    ],
)
def test_quantised_directories(quantisation: dict[str, Any], bits: float, tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", {"model_type": "qwen3", **TINY, "head_dim": 16})
    folder = write(
        tmp_path / "quantised",
        {"model_type": "qwen3", **TINY, "head_dim": 16, "quantization_config": quantisation},
    )
    planned = shape(folder)
    assert planned.weight_bits == pytest.approx(bits)
    assert planned.kv_bits == 16
    assert planned.parameters() == shape(dense).parameters()
    spec = planned.spec
    matrices = spec.layers * (2 * spec.hidden * (4 + 2) * 16 + 3 * spec.hidden * spec.ffn)
    assert planned.weight_bytes() == pytest.approx(
        (matrices * bits + (planned.parameters() - matrices) * 16) / 8, abs=1
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_local_experts": None}, "num_local_experts is null"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; there are 4 experts"),
        ({"num_hidden_layers": "4"}, 'num_hidden_layers is "4"; expected a whole number'),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads=4"),
        ({"torch_dtype": "int8"}, 'torch_dtype is "int8"; expected one of'),
        ({"quantization_config": {"quant_method": "magic"}}, 'quant_method is "magic"; the planner knows'),
        ({"quantization_config": {"quant_method": "awq"}}, "bits is missing"),
        ({"quantization_config": "fp8"}, 'quantization_config is "fp8"; expected an object'),
    ],
)
def test_errors_name_file_key_and_value(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"model_type": "mixtral", **TINY, **SPARSE["mixtral"], **change})
    with pytest.raises(ModelError) as error:
        shape(folder)
    assert complaint in str(error.value)
    assert "config.json" in str(error.value)


def test_description() -> None:
    text = shape("Qwen3-30B-A3B", weights="fp8").describe()
    assert text == "Qwen3-30B-A3B: 30.5 B parameters, 3.35 B active, weights of 8 bits, KV of 16"
