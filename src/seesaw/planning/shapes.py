"""Shapes of models for the planner: published ones by name, others from their `config.json`. No torch, no weights.

shape("Llama-3.1-70B")                               # as published, 16-bit weights and KV
shape("qwen3-30b-a3b", weights="int4", kv="fp8")     # quantised
shape("/models/Mixtral-8x7B-Instruct-v0.1-AWQ")      # a directory that has a config.json
"""

from __future__ import annotations

import csv
import difflib
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from seesaw.core.errors import ConfigError
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec, RopeSpec
from seesaw.core.moe import MoESpec
from seesaw.models.hf_config import load_spec
from seesaw.models.parameters import layer_parameter_count, layer_parameters
from seesaw.planning.config_shapes import needs_this_reader, read_shape

WEIGHT_BITS: dict[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "fp8": 8,
    "int8": 8,
    "int4": 4 + (16 + 4) / 128,
}
"""Bits of a weight by type. `int4` has, for each group of 128, a scale of 16 bits and a zero point of 4, as AWQ and
GPTQ do: 4.16 bits. The scales of `fp8` and `int8`, one for each row or for blocks of 128 x 128, are below 0.01 bits
a weight and left out."""
KV_BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8}
"""Bits of an element of K or V by type."""
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_TAILS = frozenset({"instruct", "chat", "hf", "base"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model as the planner sees it: its shape, its experts if it has any, and the types it is stored in.

    Counts of parameters are elements, whatever their type.
    """

    name: str
    spec: ModelSpec
    moe: MoESpec | None = None
    weight_bits: float = 16
    """Bits of an element of the layers' matrices, scales included (`WEIGHT_BITS`). Where these are quantised,
    embedding, LM head, routers, norms and biases keep 16 bits, as in the checkpoints people publish."""
    kv_bits: int = 16
    """Bits of an element of K or V."""

    def parameters(self) -> int:
        """All parameters: embedding, LM head (0 where it is tied), final norm, layers.

        A dense layer of hidden size h, heads H, KV heads G, head size d and FFN f has `2 h H d + 2 h G d` for
        attention, `3 h f` for its FFN, `2 h` for norms, and biases and head norms where the family has them. A
        sparse one has, for its FFN, `E h` for the router, `3 E h f_e` for E experts and `3 h f_s + h` for a
        shared expert and its gate.
        """
        return round(self._edges() + self._layers(self.moe.experts if self.moe else 0))

    def active_parameters(self) -> int:
        """Parameters that serve one token, as model cards count them: all but the experts it does not pass.

        The embedding counts whole, though a token looks up one row of it.
        """
        return round(self._edges() + self._layers(self.moe.experts_per_token if self.moe else 0))

    def touched_parameters(self, tokens: float = 1) -> float:
        """Parameters expected to be read by one Forward of `tokens` tokens.

        Of each sparse layer's E experts, `E (1 - (1 - k/E)^tokens)` (`MoESpec.expected_experts`); of the
        embedding, a row for each token, or all where it is the LM head too; everything else whole.
        """
        spec = self.spec
        rows = 0.0 if spec.tied_embeddings else min(tokens, spec.vocab)
        edges = (spec.vocab + rows + 1) * spec.hidden
        return edges + self._layers(self.moe.expected_experts(tokens) if self.moe else 0.0)

    def layer_parameters(self, layer: int) -> int:
        """Parameters of one layer, all experts included."""
        return round(self._layer(layer, self.moe.experts if self.moe else 0))

    def touched_in_layer(self, layer: int, tokens: float) -> float:
        """Parameters of one layer expected to be read to feed `tokens` tokens in one Forward."""
        return self._layer(layer, self.moe.expected_experts(tokens) if self.moe else 0.0)

    def weight_bytes(self) -> int:
        """Bytes of all weights: `weight_bits` for the layers' matrices and, where these are quantised, 16 bits for
        everything else."""
        matrices = self._matrices()
        bits = matrices * self.weight_bits + (self.parameters() - matrices) * self.other_bits
        return round(bits / 8)

    @property
    def other_bits(self) -> float:
        """Bits of an element of what is not quantised: everything but the layers' matrices."""
        return max(self.weight_bits, 16.0)

    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token: `2 * layers * kv_heads * head_dim * kv_bits / 8`."""
        spec = self.spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * self.kv_bits // 8

    def describe(self) -> str:
        """Name, size and types in a few words."""
        size = f"{self.parameters() / 1e9:.3g} B parameters"
        if self.moe:
            size += f", {self.active_parameters() / 1e9:.3g} B active"
        return f"{self.name}: {size}, weights of {self.weight_bits:.3g} bits, KV of {self.kv_bits}"

    # ---- parts --------------------------------------------------------------------------------------------

    def _edges(self) -> int:
        spec = self.spec
        return (2 - spec.tied_embeddings) * spec.vocab * spec.hidden + spec.hidden

    def _layers(self, experts: float) -> float:
        sparse = self.moe.sparse_layers if self.moe else 0
        total = (self.spec.layers - sparse) * float(layer_parameter_count(self.spec))
        return total + sparse * self._sparse_layer(experts)

    def _layer(self, layer: int, experts: float) -> float:
        if self.moe and layer in self.moe.sparse:
            return self._sparse_layer(experts)
        return float(layer_parameter_count(self.spec))

    def _sparse_layer(self, experts: float) -> float:
        """A sparse layer with so many experts."""
        if self.moe is None:
            return 0.0
        spec, moe = self.spec, self.moe
        feed_forward = 3 * spec.hidden * spec.ffn + spec.mlp_bias * (2 * spec.ffn + spec.hidden)
        shared = moe.shared_ffn and 3 * spec.hidden * moe.shared_ffn + spec.hidden
        router = spec.hidden * moe.experts
        around = layer_parameter_count(spec) - feed_forward + router + shared
        return around + experts * 3.0 * spec.hidden * moe.expert_ffn

    def _matrices(self) -> int:
        """Elements of all matrices that quantisation changes."""
        spec, moe = self.spec, self.moe
        sparse = moe.sparse_layers if moe else 0
        dense = next(layer for layer in range(spec.layers + 1) if not (moe and layer in moe.sparse))
        examples = (spec.layers - sparse, dense), (sparse, moe.sparse[0] if moe else 0)
        return sum(
            count * sum(p.size for p in layer_parameters(spec, layer, moe) if p.matrix)
            for count, layer in examples
            if count
        )


def shape(
    name_or_directory: str | Path, *, weights: str | None = None, kv: str | None = None
) -> PlannedModel:
    """The shape of a model, by published name or from a directory that has a `config.json`.

    Names are those of the Hugging Face hub, in any case, with or without the owner and with or without
    `-Instruct`, `-chat`, `-hf`; `shape_names()` lists them. What the engine runs is read strictly
    (`models.hf_config`), mixtures of experts and quantised checkpoints (fp8, AWQ, GPTQ, bitsandbytes,
    compressed-tensors) as far as costs depend on it; weights are not looked at. A directory goes before a
    published name.

    `weights` and `kv` (`bf16`, `fp16`, `fp8`, `int8`; weights also `int4`) replace the types the model has, which
    are 16 bits for published names. Raises `ConfigError`: an unknown name (with near ones) or type; `ModelError`
    for a `config.json` that cannot be used.
    """
    directory = Path(name_or_directory)
    published = _published().get(_key(str(name_or_directory)))
    if os.path.isfile(directory / "config.json") or (os.path.isdir(directory) and published is None):
        model = _from_directory(directory)
    elif published is not None:
        model = published
    else:
        raise _unknown(str(name_or_directory))
    if weights is not None:
        model = replace(model, weight_bits=WEIGHT_BITS[_type("weights", weights, list(WEIGHT_BITS))])
    if kv is not None:
        model = replace(model, kv_bits=KV_BITS[_type("kv", kv, list(KV_BITS))])
    return model


def stored_as(spec: ModelSpec, dtype: DType, name: str) -> PlannedModel:
    """`spec` with weights and KV of one type, as the engine holds them."""
    bits = 8 * DTYPE_BYTES[dtype]
    return PlannedModel(name=name, spec=spec, weight_bits=float(bits), kv_bits=bits)


def shape_names() -> tuple[str, ...]:
    """The published names, without aliases."""
    return tuple(dict.fromkeys(model.name for model in _published().values()))


def _from_directory(directory: Path) -> PlannedModel:
    name = directory.resolve().name
    if needs_this_reader(directory):
        read = read_shape(directory)
        spec, moe, bits = read.spec, read.moe, read.weight_bits
    else:
        spec, moe, bits = load_spec(directory), None, None
    own = 8 * DTYPE_BYTES[spec.dtype]
    return PlannedModel(
        name=name, spec=spec, moe=moe, weight_bits=float(own if bits is None else bits), kv_bits=own
    )


def _type(field: str, name: str, known: list[str]) -> str:
    cleaned = _SHORT.get(name.lower(), name.lower())
    if cleaned not in known:
        raise ConfigError(f"{field}={name!r}: choose one of {', '.join(known)}")
    return cleaned


def _unknown(name: str) -> ConfigError:
    names = {_key(n): n for n in shape_names()}
    near = difflib.get_close_matches(_key(name), list(names), n=4, cutoff=0.5)
    offer = "near names are" if near else "known are"
    listed = ", ".join(names[key] for key in near or names)
    return ConfigError(
        f"model {name!r}: neither a directory with a config.json nor a shape known by name; {offer} {listed}"
    )


def _key(name: str) -> str:
    """`name` without owner, case, separators and the words that do not change a shape."""
    words = name.strip().rstrip("/").rpartition("/")[2].lower().replace("_", "-").replace(" ", "-").split("-")
    if words[0] == "meta":
        words = words[1:]
    return "".join(word for word in words if word not in _TAILS)


@lru_cache(maxsize=1)
def _published() -> dict[str, PlannedModel]:
    """The shapes that come with the planner, by key of their names and aliases."""
    text = (files("seesaw.planning") / "data" / "shapes.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    models: dict[str, PlannedModel] = {}
    for row in csv.DictReader(lines):
        model = _published_model(row)
        for name in (row["name"], *row["aliases"].split()):
            models[_key(name)] = model
    return models


def _published_model(row: dict[str, str]) -> PlannedModel:
    theta = float(row["rope_theta"])
    rope = RopeSpec(theta=theta)
    if row["rope_factor"]:
        rope = RopeSpec(
            theta=theta, kind="llama3", factor=float(row["rope_factor"]), original_max_position=8192
        )
    spec = ModelSpec(
        family=row["family"],
        layers=int(row["layers"]),
        hidden=int(row["hidden"]),
        heads=int(row["heads"]),
        kv_heads=int(row["kv_heads"]),
        head_dim=int(row["head_dim"]),
        ffn=int(row["ffn"]),
        vocab=int(row["vocab"]),
        max_position=int(row["context"]),
        rms_eps=float(row["rms_eps"]),
        rope=rope,
        qk_norm=row["family"].startswith("qwen3"),
        tied_embeddings=row["tied"] == "tied",
    )
    moe = None
    if row["experts"]:
        moe = MoESpec(
            experts=int(row["experts"]),
            experts_per_token=int(row["experts_per_token"]),
            expert_ffn=int(row["expert_ffn"]),
            sparse=tuple(range(spec.layers)),
        )
    return PlannedModel(name=row["name"], spec=spec, moe=moe)
