"""Read a Hugging Face `config.json` into a `ModelSpec`, without torch or transformers.

Defaults of missing keys are those of transformers 5. A setting that would change the arithmetic and that the
decoder does not implement is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec, RopeSpec

_T = TypeVar("_T")
_RopeKind = Literal["default", "linear", "llama3", "yarn"]

_ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class _Family:
    """What transformers assumes for one `model_type` when its `config.json` leaves a key out."""

    architecture: str
    kv_heads: int | None
    """Value of a missing `num_key_value_heads`; None means as many as `num_attention_heads`."""
    max_position: int
    head_dim: int | None = None
    """Value of a missing `head_dim`; None means `hidden_size / num_attention_heads`."""
    bos: int | None = None
    eos: int | None = None
    optional_attention_bias: bool = False
    optional_mlp_bias: bool = False
    fixed_qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES: dict[str, _Family] = {
    "llama": _Family(
        "LlamaForCausalLM", None, 2048, bos=1, eos=2, optional_attention_bias=True, optional_mlp_bias=True
    ),
    "mistral": _Family("MistralForCausalLM", 8, 131072, bos=1, eos=2),
    "qwen2": _Family("Qwen2ForCausalLM", 32, 32768, fixed_qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", 32, 32768, head_dim=128, optional_attention_bias=True, qk_norm=True),
}


class _Reader:
    """Typed access to the keys of one JSON object; every complaint names file, key and value.

    `null` counts as missing, as most configs write it for "not set".
    """

    def __init__(self, where: str, values: Mapping[str, object]) -> None:
        self.where = where
        self.values = values

    def fail(self, key: str, wanted: str) -> NoReturn:
        """Raise `ModelError` about `key` as it is in the file."""
        shown = json.dumps(self.values[key]) if key in self.values else "missing"
        if len(shown) > 100:
            shown = f"{shown[:97]}..."
        raise ModelError(f"{self.where}: {key} is {shown}; {wanted}")

    def get(self, key: str) -> object | None:
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is written at all, be it as null."""
        return key in self.values

    def optional_int(self, key: str, default: _T, *, low: int | None = 1) -> int | _T:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
            self.fail(key, "expected a whole number" + ("" if low is None else f" of at least {low}"))
        return value

    def required_int(self, key: str) -> int:
        value = self.optional_int(key, None)
        if value is None:
            self.fail(key, "a whole number of at least 1 is required")
        return value

    def optional_float(self, key: str, default: _T) -> float | _T:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            self.fail(key, "expected a finite number")
        return float(value)

    def required_float(self, key: str) -> float:
        value = self.optional_float(key, None)
        if value is None:
            self.fail(key, "a number is required")
        return value

    def optional_bool(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "expected true or false")
        return value

    def optional_str(self, key: str, default: _T) -> str | _T:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, "expected a string")
        return value

    def required_str(self, key: str) -> str:
        value = self.optional_str(key, None)
        if value is None:
            self.fail(key, "a string is required")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "expected a list of strings")
        return tuple(cast("list[str]", value))

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            self.fail(key, "expected a token id or a list of token ids")
        return tuple(cast("list[int]", items))

    def child(self, key: str) -> _Reader | None:
        """The object under `key`, or None where it is missing, null or empty."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "expected an object")
        return _Reader(f"{self.where}: {key}", value) if value else None


def load_spec(path: str | Path) -> ModelSpec:
    """Read the checkpoint directory `path` into a `ModelSpec`.

    Reads `config.json`, and `generation_config.json` for further end-of-sequence ids where there is one.
    Weights are not looked at. A config that states no type is taken as float32. Token ids outside the
    vocabulary can never be sampled and are left out. Raises `ModelError` naming file, key and value for
    everything that is missing, malformed or not supported.
    """
    directory = Path(path)
    reader = _open(directory / "config.json")
    name = reader.required_str("model_type")
    if name not in _FAMILIES:
        reader.fail("model_type", f"supported are {', '.join(_FAMILIES)}")
    family = _FAMILIES[name]
    _refuse_unsupported(reader, family)
    layers = reader.required_int("num_hidden_layers")
    hidden = reader.required_int("hidden_size")
    heads = reader.required_int("num_attention_heads")
    vocab = reader.required_int("vocab_size")
    max_position = reader.optional_int("max_position_embeddings", family.max_position)
    attention_bias = _attention_bias(reader, family)
    return ModelSpec(
        family=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(reader, family, heads),
        head_dim=_head_dim(reader, family, hidden, heads),
        ffn=reader.required_int("intermediate_size"),
        vocab=vocab,
        max_position=max_position,
        rms_eps=_above(reader, "rms_norm_eps", 0, 1e-6),
        rope=_rope(reader, max_position),
        qkv_bias=attention_bias or family.fixed_qkv_bias,
        output_bias=attention_bias,
        mlp_bias=_mlp_bias(reader, family),
        qk_norm=family.qk_norm,
        tied_embeddings=reader.optional_bool("tie_word_embeddings", False),
        sliding_window=_sliding_window(reader, name, layers),
        dtype=_dtype(reader),
        bos_token_id=_bos(reader, family, vocab),
        eos_token_ids=_eos(reader, family, vocab, directory / "generation_config.json"),
    )


def _open(file: Path) -> _Reader:
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{file}: no such file; expected the directory of a Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return _Reader(str(file), values)


def _refuse_unsupported(reader: _Reader, family: _Family) -> None:
    architectures = reader.strings("architectures")
    if architectures and architectures != (family.architecture,):
        reader.fail("architectures", f'supported for this model_type is ["{family.architecture}"]')
    if reader.optional_str("hidden_act", "silu") != "silu":
        reader.fail("hidden_act", 'supported is "silu"')
    for key in ("quantization_config", "compression_config"):
        if reader.get(key) is not None:
            reader.fail(
                key, "quantised checkpoints are not supported; use a float32, bfloat16 or float16 one"
            )
    if reader.optional_int("pretraining_tp", 1, low=None) not in (0, 1):
        reader.fail("pretraining_tp", "supported is 1")
    if reader.optional_float("partial_rotary_factor", 1.0) != 1.0:
        reader.fail("partial_rotary_factor", "supported is 1.0")
    if reader.get("per_layer_config") is not None:
        reader.fail("per_layer_config", "layers of different shapes are not supported")


def _kv_heads(reader: _Reader, family: _Family, heads: int) -> int:
    key = "num_key_value_heads"
    kv_heads = reader.optional_int(
        key, heads if reader.has(key) or family.kv_heads is None else family.kv_heads
    )
    if heads % kv_heads:
        default = "" if reader.has(key) else f", which means {kv_heads} for {family.architecture}"
        reader.fail(key, f"it must divide num_attention_heads={heads}{default}")
    return kv_heads


def _head_dim(reader: _Reader, family: _Family, hidden: int, heads: int) -> int:
    if reader.has("head_dim") and reader.get("head_dim") is None and family.head_dim is not None:
        reader.fail("head_dim", f"{family.architecture} requires a whole number")
    head_dim = reader.optional_int("head_dim", family.head_dim)
    if head_dim is None:
        if hidden % heads:
            reader.fail("num_attention_heads", f"without head_dim it must divide hidden_size={hidden}")
        head_dim = hidden // heads
    if head_dim % 2:
        shown = "head_dim" if reader.get("head_dim") is not None else "hidden_size"
        reader.fail(shown, f"the head dimension is {head_dim}, and rotary embedding needs an even one")
    return head_dim


def _attention_bias(reader: _Reader, family: _Family) -> bool:
    """Whether q, k, v and o all have biases."""
    stated = reader.optional_bool("attention_bias", family.fixed_qkv_bias)
    if family.optional_attention_bias:
        return stated
    if stated != family.fixed_qkv_bias:
        reader.fail("attention_bias", f"supported for {family.architecture} is {str(not stated).lower()}")
    return False


def _mlp_bias(reader: _Reader, family: _Family) -> bool:
    stated = reader.optional_bool("mlp_bias", False)
    if stated and not family.optional_mlp_bias:
        reader.fail("mlp_bias", f"supported for {family.architecture} is false")
    return stated


def _sliding_window(reader: _Reader, name: str, layers: int) -> tuple[int | None, ...]:
    """Window of every layer; empty where no layer has one."""
    window = reader.optional_int("sliding_window", None if reader.has("sliding_window") else 4096)
    kinds = _layer_types(reader, layers)
    if name == "llama":
        if reader.get("sliding_window") is not None:
            reader.fail("sliding_window", "LlamaForCausalLM has none; supported is null")
        window = None
    if name in ("llama", "mistral"):
        uniform = "full_attention" if window is None else "sliding_attention"
        if kinds is not None and set(kinds) != {uniform}:
            reader.fail("layer_types", f'with this sliding_window, every layer must be "{uniform}"')
        return () if window is None else (window,) * layers
    if not reader.optional_bool("use_sliding_window", False):
        window = None
    if kinds is None:
        first = reader.optional_int("max_window_layers", 28, low=0)
        kinds = tuple("full_attention" if i < first else "sliding_attention" for i in range(layers))
    elif window is None and "sliding_attention" in kinds:
        reader.fail("layer_types", "sliding_attention needs use_sliding_window and sliding_window")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return () if all(w is None for w in windows) else windows


def _layer_types(reader: _Reader, layers: int) -> tuple[str, ...] | None:
    kinds = reader.strings("layer_types")
    if kinds is None:
        return None
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        reader.fail("layer_types", "supported entries are full_attention and sliding_attention")
    if len(kinds) != layers:
        reader.fail("layer_types", f"it must have num_hidden_layers={layers} entries")
    return kinds


def _rope(reader: _Reader, max_position: int) -> RopeSpec:
    """Both forms of rope settings: `rope_theta` with `rope_scaling`, and `rope_parameters`."""
    theta = _above(reader, "rope_theta", 1, 10000.0)
    original = reader.optional_int("original_max_position_embeddings", None)
    forms = [form for key in ("rope_scaling", "rope_parameters") if (form := reader.child(key)) is not None]
    specs = [_rope_form(form, theta, original, max_position) for form in forms]
    if not specs:
        return RopeSpec(theta=theta)
    if len(specs) == 2 and specs[0] != specs[1]:
        reader.fail(
            "rope_parameters", f"it contradicts rope_scaling {json.dumps(reader.get('rope_scaling'))}"
        )
    if reader.get("rope_theta") is not None and specs[0].theta != theta:
        reader.fail(
            "rope_theta", f"it contradicts the {specs[0].theta} inside {forms[0].where.split(': ')[-1]}"
        )
    return specs[0]


def _rope_form(form: _Reader, theta: float, original: int | None, max_position: int) -> RopeSpec:
    if any(isinstance(value, dict) for value in form.values.values()):
        raise ModelError(f"{form.where} differs between layer types; supported is one setting for all layers")
    key = "rope_type" if form.get("rope_type") is not None else "type"
    kind = form.optional_str(key, "default")
    if kind not in _ROPE_KEYS:
        form.fail(key, f"supported are {', '.join(_ROPE_KEYS)}")
    if form.optional_str("type", kind) != kind:
        form.fail("type", f"it contradicts rope_type={kind}")
    for key in form.values:
        if form.get(key) is not None and key not in _ROPE_KEYS[kind] | _ROPE_COMMON:
            form.fail(key, f"rope type {kind} has no such setting")
    if form.optional_float("partial_rotary_factor", 1.0) != 1.0:
        form.fail("partial_rotary_factor", "supported is 1.0")
    inner_theta = _above(form, "rope_theta", 1, theta)
    return _rope_scaled(form, cast("_RopeKind", kind), inner_theta, original, max_position)


def _rope_scaled(
    form: _Reader, kind: _RopeKind, theta: float, original: int | None, max_position: int
) -> RopeSpec:
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=_factor(form))
    # transformers lets a value beside the rope settings override the one inside them
    inner = form.optional_int("original_max_position_embeddings", max_position)
    trained = inner if original is None else original
    if kind == "llama3":
        low, high = form.required_float("low_freq_factor"), form.required_float("high_freq_factor")
        if not 0 < low < high:
            form.fail("high_freq_factor", f"it must exceed low_freq_factor={low}, and both must exceed 0")
        return RopeSpec(
            theta=theta,
            kind=kind,
            factor=_factor(form),
            original_max_position=trained,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return _yarn(form, theta, trained, max_position)


def _yarn(form: _Reader, theta: float, trained: int, max_position: int) -> RopeSpec:
    stated = form.get("attention_factor") is not None
    implied = form.has("factor") and form.get("factor") is None
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=max_position / trained if implied else _factor(form),
        original_max_position=trained,
        beta_fast=form.optional_float("beta_fast", 32.0) or 32.0,
        beta_slow=form.optional_float("beta_slow", 1.0) or 1.0,
        mscale=form.optional_float("mscale", 0.0),
        mscale_all_dim=form.optional_float("mscale_all_dim", 0.0),
        attention_factor=_above(form, "attention_factor", 0, 1.0) if stated else None,
        truncate=form.optional_bool("truncate", True),
    )


def _factor(form: _Reader) -> float:
    factor = form.required_float("factor")
    if factor < 1:
        form.fail("factor", "expected a number of at least 1")
    return factor


def _above(reader: _Reader, key: str, bound: float, default: float) -> float:
    value = reader.optional_float(key, default)
    if value <= bound:
        reader.fail(key, f"expected a number greater than {bound}")
    return value


def _dtype(reader: _Reader) -> DType:
    key = "dtype" if reader.get("dtype") is not None else "torch_dtype"
    dtype = reader.optional_str(key, "float32")
    if dtype not in DTYPE_BYTES:
        reader.fail(key, f"supported are {', '.join(DTYPE_BYTES)}")
    return cast("DType", dtype)


def _bos(reader: _Reader, family: _Family, vocab: int) -> int | None:
    bos = reader.optional_int("bos_token_id", None if reader.has("bos_token_id") else family.bos, low=None)
    return bos if bos is not None and 0 <= bos < vocab else None


def _eos(reader: _Reader, family: _Family, vocab: int, generation: Path) -> tuple[int, ...]:
    """Ids of `config.json`, then those only `generation_config.json` has."""
    further = _open(generation).token_ids("eos_token_id") if generation.exists() else ()
    ids = reader.token_ids("eos_token_id")
    if not reader.has("eos_token_id") and not further and family.eos is not None:
        ids = (family.eos,)
    return tuple(token for token in dict.fromkeys(ids + further) if 0 <= token < vocab)
