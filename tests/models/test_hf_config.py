"""Reading `config.json`: agreement with transformers, and a refusal for everything we do not implement."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import RopeSpec
from seesaw.models.hf_config import load_spec

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
_MISTRAL = {
    **_LLAMA,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_attention_heads": 16,
}
_QWEN2 = {
    **_LLAMA,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_key_value_heads": 2,
}
_QWEN3 = {**_QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
_BASES = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def _write(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


_ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{family}-defaults": (family, {}) for family in _BASES},
    "kv-heads": ("llama", {"num_key_value_heads": 2}),
    "kv-heads-of-qwen-null": ("qwen2", {"num_key_value_heads": None}),
    "head-dim": ("llama", {"head_dim": 20}),
    "head-dim-null": ("mistral", {"head_dim": None}),
    "head-dim-of-qwen2": ("qwen2", {"head_dim": 20}),
    "head-dim-of-qwen3": ("qwen3", {"head_dim": 20}),
    "tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "old-name-of-dtype": ("llama", {"torch_dtype": "float16"}),
    "both-names-of-dtype": ("llama", {"torch_dtype": "float16", "dtype": "bfloat16"}),
    "tokens": ("llama", {"bos_token_id": 7, "eos_token_id": [8, 9]}),
    "tokens-null": ("llama", {"bos_token_id": None, "eos_token_id": None}),
    "window": ("mistral", {"sliding_window": 17}),
    "window-null": ("mistral", {"sliding_window": None}),
    "window-of-qwen2-off": ("qwen2", {"sliding_window": 17, "max_window_layers": 2}),
    "window-of-qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 3}),
    "window-of-qwen2-too-high": ("qwen2", {"use_sliding_window": True, "sliding_window": 17}),
    "window-of-qwen3-default": ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    "window-by-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "old-theta": ("llama", {"rope_theta": 500000.0, "rope_scaling": None}),
    "old-linear": ("llama", {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2}}),
    "old-llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}}),
    "old-yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
    ),
    "new-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "new-theta-outside": (
        "llama",
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "new-llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}}),
    "new-yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 8192,
                "beta_fast": 16,
                "beta_slow": 2.0,
                "mscale": 0.5,
                "mscale_all_dim": 0.25,
                "truncate": False,
            }
        },
    ),
    "yarn-original-missing": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "yarn-original-beside": (
        "llama",
        {
            "original_max_position_embeddings": 512,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99},
        },
    ),
    "yarn-attention-factor": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
    ),
}


@pytest.mark.parametrize("name", list(_ACCEPTED))
def test_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    family, changes = _ACCEPTED[name]
    path = _write(tmp_path, {**_BASES[family], **changes})
    ours, theirs = load_spec(path), AutoConfig.from_pretrained(path)
    assert (ours.family, ours.layers, ours.hidden) == (family, 4, 256)
    assert (ours.heads, ours.ffn, ours.vocab) == (theirs.num_attention_heads, 100, 1000)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // theirs.num_attention_heads)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert f"torch.{ours.dtype}" == str(theirs.dtype or "torch.float32")
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.bos_token_id == theirs.bos_token_id
    assert [ours.window(layer) for layer in range(4)] == _windows(family, theirs)
    _assert_same_rope(ours.rope, theirs)


def _windows(family: str, config: Any) -> list[int | None]:
    if family == "llama":
        return [None] * 4
    if family == "mistral":
        return [config.sliding_window] * 4
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def _assert_same_rope(rope: RopeSpec, config: Any) -> None:
    config.original_max_position_embeddings = getattr(
        config, "original_max_position_embeddings", None
    ) or config.rope_parameters.get("original_max_position_embeddings", 0)
    config.standardize_rope_params()
    theirs = config.rope_parameters
    assert rope.kind == theirs["rope_type"]
    assert rope.theta == theirs["rope_theta"]
    for ours, key in (
        ("factor", "factor"),
        ("original_max_position", "original_max_position_embeddings"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
        ("mscale", "mscale"),
        ("mscale_all_dim", "mscale_all_dim"),
        ("attention_factor", "attention_factor"),
        ("truncate", "truncate"),
    ):
        assert getattr(rope, ours) == theirs.get(key, getattr(RopeSpec(), ours)), key


def test_biases_and_norms_of_each_family(tmp_path: Path) -> None:
    def flags(family: str, **changes: Any) -> tuple[bool, bool, bool, bool]:
        spec = load_spec(_write(tmp_path, {**_BASES[family], **changes}))
        return spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm

    assert flags("llama") == (False, False, False, False)
    assert flags("llama", attention_bias=True) == (True, True, False, False)
    assert flags("llama", mlp_bias=True) == (False, False, True, False)
    assert flags("mistral") == (False, False, False, False)
    assert flags("qwen2") == (True, False, False, False)
    assert flags("qwen3") == (False, False, False, True)
    assert flags("qwen3", attention_bias=True) == (True, True, False, True)


def test_yarn_without_factor_takes_the_ratio_of_lengths(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    spec = load_spec(_write(tmp_path, {**_LLAMA, "max_position_embeddings": 1536, "rope_scaling": scaling}))
    assert spec.rope.factor == 3.0


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 5, 7]}, (5, 6, 7)),
        ({}, {"eos_token_id": 6}, (6,)),
        ({}, {"temperature": 0.6}, (2,)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": [-1, 999, 1000]}, None, (999,)),
    ],
)
def test_ends_of_sequence(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert load_spec(_write(tmp_path, {**_LLAMA, **config}, generation)).eos_token_ids == expected


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": settings}


_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gemma3"}, 'model_type is "gemma3"; supported are llama, mistral, qwen2, qwen3'),
    ("llama", {"model_type": None}, "model_type is null; a string is required"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, 'supported .* is ["LlamaForCausalLM"]'),
    ("llama", {"architectures": "LlamaForCausalLM"}, "expected a list of strings"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported is "silu"'),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config .* not supported"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2; supported is 1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported is 1.0"),
    ("llama", {"hidden_size": None}, "hidden_size is null; a whole number of at least 1 is required"),
    ("llama", {"hidden_size": "256"}, 'hidden_size is "256"; expected a whole number of at least 1'),
    ("llama", {"hidden_size": 256.0}, "hidden_size is 256.0; expected a whole number"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is true; expected a whole number"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
    (
        "llama",
        {"num_attention_heads": 7},
        "num_attention_heads is 7; without head_dim it must divide hidden_size=256",
    ),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads=8"),
    ("qwen2", {"num_key_value_heads": ...}, "num_key_value_heads is missing; .* which means 32"),
    ("llama", {"head_dim": 15}, "head_dim is 15; the head dimension is 15, .* even"),
    ("qwen3", {"head_dim": None}, "head_dim is null; Qwen3ForCausalLM requires"),
    ("llama", {"rms_norm_eps": "tiny"}, 'rms_norm_eps is "tiny"; expected a finite number'),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number greater than 0"),
    ("llama", {"rms_norm_eps": 10**400}, "expected a finite number"),
    ("llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"; expected true or false'),
    ("llama", {"dtype": "float64"}, 'dtype is "float64"; supported are float32, bfloat16, float16'),
    ("llama", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype is .* supported are"),
    ("llama", {"eos_token_id": "</s>"}, "eos_token_id is .* expected a token id or a list"),
    ("llama", {"sliding_window": 100}, "sliding_window is 100; LlamaForCausalLM has none"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a whole number of at least 1"),
    (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types .* every layer must be",
    ),
    (
        "mistral",
        {"attention_bias": True},
        "attention_bias is true; supported for MistralForCausalLM is false",
    ),
    ("mistral", {"mlp_bias": True}, "mlp_bias is true; supported for MistralForCausalLM is false"),
    ("qwen2", {"attention_bias": False}, "attention_bias is false; supported for Qwen2ForCausalLM is true"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "must have num_hidden_layers=4 entries"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"] * 2}, "supported entries are"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "needs use_sliding_window and sliding_window"),
    (
        "llama",
        _rope(rope_type="dynamic", factor=2.0),
        'rope_type is "dynamic"; supported are default, linear',
    ),
    ("llama", {"rope_scaling": {"type": "mrope"}}, 'rope_scaling: type is "mrope"; supported are'),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
        "type .* contradicts rope_type",
    ),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling is .* expected an object"),
    ("llama", _rope(rope_type="linear"), "rope_parameters: factor is missing; a number is required"),
    ("llama", _rope(rope_type="linear", factor=0.5), "factor is 0.5; expected a number of at least 1"),
    ("llama", _rope(rope_type="default", factor=8.0), "factor is 8.0; rope type default has no such setting"),
    (
        "llama",
        _rope(rope_type="yarn", factor=2.0, attn_factor=1.1),
        "attn_factor is 1.1; rope type yarn has no such",
    ),
    ("llama", _rope(rope_type="yarn", factor=2.0, attention_factor=0), "attention_factor is 0; expected"),
    ("llama", _rope(rope_type="default", partial_rotary_factor=0.25), "partial_rotary_factor is 0.25"),
    ("llama", _rope(rope_type="default", rope_theta=1), "rope_theta is 1; expected a number greater than 1"),
    ("llama", _rope(rope_type="llama3", factor=2.0), "low_freq_factor is missing"),
    (
        "llama",
        _rope(rope_type="llama3", **{**_LLAMA3, "high_freq_factor": 1.0}),
        "it must exceed low_freq_factor",
    ),
    ("qwen3", _rope(full_attention={"rope_type": "default"}), "differs between layer types"),
    ("llama", {"rope_theta": 1e6, **_rope(rope_type="default", rope_theta=1e4)}, "rope_theta .* contradicts"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, **_rope(rope_type="linear", factor=4.0)},
        "rope_parameters .* contradicts rope_scaling",
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), _REFUSED, ids=[message for *_, message in _REFUSED]
)
def test_refuses_with_one_sentence(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    merged = {**_BASES[family], **changes}
    path = _write(tmp_path, {key: value for key, value in merged.items() if value is not ...})
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(ModelError, match=pattern) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path / "config.json"))
    assert "\n" not in str(caught.value)


def test_refuses_files_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: not valid JSON"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json: expected a JSON object, found list"):
        load_spec(tmp_path)
    _write(tmp_path, _LLAMA)
    (tmp_path / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"generation_config.json: not valid JSON"):
        load_spec(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be read: Not a directory"):
        load_spec(tmp_path / "config.json")


def test_does_not_import_torch() -> None:
    code = (
        "import sys, seesaw.models.hf_config as _; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
