"""Shapes of checkpoints that the engine does not run and the planner prices: mixtures of experts, quantised weights.

Reads what costs depend on and nothing else; `models.hf_config` is the strict reader of what the engine runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec, RopeSpec
from seesaw.core.moe import MoESpec

_SPARSE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
_DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_SCALE_BITS, _ZERO_BITS = 16, 4


@dataclass(frozen=True, slots=True)
class ConfigShape:
    """What a `config.json` says. `weight_bits` is None for weights that are not quantised."""

    spec: ModelSpec
    moe: MoESpec | None
    weight_bits: float | None


class _Config:
    """Typed access to a `config.json`; complaints name file, key and value. A null counts as missing."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, values

    def fail(self, key: str, wanted: str) -> NoReturn:
        shown = json.dumps(self.values[key])[:100] if key in self.values else "missing"
        raise ModelError(f"{self.where}: {key} is {shown}; {wanted}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def whole(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not int or value < low:
            self.fail(key, f"expected a whole number of at least {low}")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
            self.fail(key, "expected a number greater than 0")
        return float(value)

    def child(self, key: str) -> _Config:
        """The object under `key`; an empty one where it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, "expected an object")
        return _Config(f"{self.where}: {key}", value or {})


def needs_this_reader(directory: Path) -> bool:
    """Whether the checkpoint in `directory` is sparse or quantised.

    A file that cannot be read is not; the strict reader says what is wrong with it.
    """
    try:
        values = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and (
        values.get("model_type") in _SPARSE or bool(values.get("quantization_config"))
    )


def read_shape(directory: Path) -> ConfigShape:
    """Read the `config.json` in `directory`. Raises `ModelError` naming file, key and value."""
    file = directory / "config.json"
    config = _Config(str(file), json.loads(file.read_bytes()))
    family = config.get("model_type")
    if family not in _SPARSE | _DENSE:
        known = ", ".join(sorted(_SPARSE | _DENSE))
        config.fail("model_type", f"the planner knows {known}")
    quantised = config.child("quantization_config")
    bits = _weight_bits(quantised) if quantised.values else None
    return ConfigShape(_spec(config, family), _moe(config, family) if family in _SPARSE else None, bits)


def _spec(config: _Config, family: str) -> ModelSpec:
    layers, hidden = config.whole("num_hidden_layers"), config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    kv_heads = config.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        config.fail("num_key_value_heads", f"it must divide num_attention_heads={heads}")
    head_dim = config.whole("head_dim", 128 if family in ("qwen3", "qwen3_moe") else hidden // heads)
    bias = bool(config.get("attention_bias"))
    rope = config.child("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    return ModelSpec(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config.whole("intermediate_size"),
        vocab=config.whole("vocab_size"),
        max_position=config.whole("max_position_embeddings"),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        rope=RopeSpec(theta=rope.number("rope_theta", config.number("rope_theta", 10000.0))),
        qkv_bias=bias or family in ("qwen2", "qwen2_moe"),
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        sliding_window=_sliding_window(config, family, layers),
        dtype=_dtype(config),
    )


def _sliding_window(config: _Config, family: str, layers: int) -> tuple[int | None, ...]:
    if family in ("mistral", "mixtral"):
        if config.get("sliding_window") is None:
            return ()
        return (config.whole("sliding_window"),) * layers
    if config.get("use_sliding_window"):
        config.fail("use_sliding_window", "the planner knows it for mistral and mixtral only")
    return ()


def _dtype(config: _Config) -> DType:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key) or "bfloat16"
    if dtype not in DTYPE_BYTES:
        config.fail(key, f"expected one of {', '.join(DTYPE_BYTES)}")
    return cast("DType", dtype)


def _moe(config: _Config, family: str) -> MoESpec:
    names = (
        ("num_local_experts", "num_experts") if family == "mixtral" else ("num_experts", "num_local_experts")
    )
    key = next((name for name in names if config.get(name) is not None), names[0])
    experts = config.whole(key)
    per_token = config.whole("num_experts_per_tok")
    if per_token > experts:
        config.fail("num_experts_per_tok", f"there are {experts} experts")
    layers = config.whole("num_hidden_layers")
    if family == "mixtral":
        return MoESpec(
            experts=experts,
            experts_per_token=per_token,
            expert_ffn=config.whole("intermediate_size"),
            sparse=tuple(range(layers)),
        )
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        config.fail("mlp_only_layers", "expected a list of layer numbers")
    step = config.whole("decoder_sparse_step", 1)
    sparse = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if not sparse:
        config.fail("decoder_sparse_step", "with mlp_only_layers, it leaves no layer that has experts")
    return MoESpec(
        experts=experts,
        experts_per_token=per_token,
        expert_ffn=config.whole("moe_intermediate_size"),
        shared_ffn=config.whole("shared_expert_intermediate_size", low=0) if family == "qwen2_moe" else 0,
        sparse=sparse,
    )


def _weight_bits(config: _Config) -> float:
    """Bits of a quantised weight, its share of the scales and zero points of its group included."""
    method = config.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0
    if method in ("awq", "gptq"):
        zeros = config.get("zero_point") is not False
        return _grouped(config, config.whole("bits"), _SCALE_BITS + _ZERO_BITS * zeros)
    if method == "bitsandbytes":
        four = config.get("load_in_4bit") or config.get("_load_in_4bit")
        return 4.5 if four else 8.0  # a float32 scale for each 64 weights of 4 bits
    if method == "compressed-tensors":
        groups = list(config.child("config_groups").values)
        if groups:
            weights = config.child("config_groups").child(groups[0]).child("weights")
            return _grouped(weights, weights.whole("num_bits"), _SCALE_BITS)
    config.fail(
        "quant_method", "the planner knows fp8, fbgemm_fp8, awq, gptq, bitsandbytes, compressed-tensors"
    )


def _grouped(config: _Config, bits: int, overhead: int) -> float:
    """`overhead` bits stand beside each group of weights; without groups they stand beside a whole row."""
    size = config.get("group_size")
    grouped = type(size) is int and size > 0
    return bits + overhead / size if grouped else float(bits)
