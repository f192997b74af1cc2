"""The parameters of a checkpoint as data: names, shapes, where they live, how tensor parallelism splits them.

No torch here. Names are those of Hugging Face checkpoints (Llama, Mistral, Qwen2, Qwen3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from seesaw.core.model_spec import ModelSpec

Axis = Literal["q_heads", "kv_heads", "ffn", "vocab"]
Place = Literal["embed", "layer", "head"]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Split:
    """Tensor parallelism divides dimension `dim` by the units of `axis`, each `unit` elements wide."""

    dim: int
    axis: Axis
    unit: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a checkpoint. `split` is None for one that every tensor-parallel rank holds whole.

    `layer` is the decoder layer it belongs to (`place == "layer"`), else None.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    place: Place
    split: Split | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def head_parameter(spec: ModelSpec) -> str:
    """Name of the parameter the LM head multiplies with: the embedding itself when the two are tied."""
    return EMBEDDING if spec.tied_embeddings else LM_HEAD


@lru_cache(maxsize=64)
def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """All parameters a checkpoint must have: embedding, layers in order, final norm, LM head."""
    before, *after = edge_parameters(spec)
    layers = (parameter for layer in range(spec.layers) for parameter in layer_parameters(spec, layer))
    return (before, *layers, *after)


def edge_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """The parameters outside the layers: embedding, final norm and, unless it is tied, the LM head."""
    rows = Split(0, "vocab", 1)
    embedding = Parameter(EMBEDDING, (spec.vocab, spec.hidden), None, "embed", rows)
    norm = Parameter(FINAL_NORM, (spec.hidden,), None, "head", None)
    head = Parameter(LM_HEAD, (spec.vocab, spec.hidden), None, "head", rows)
    return (embedding, norm) if spec.tied_embeddings else (embedding, norm, head)


def layer_parameters(spec: ModelSpec, layer: int) -> tuple[Parameter, ...]:
    """Parameters of one decoder layer."""
    prefix = f"model.layers.{layer}."
    return tuple(
        Parameter(prefix + suffix, shape, layer, "layer", split)
        for suffix, shape, split in _layer_table(spec)
    )


def parameter_count(spec: ModelSpec) -> int:
    """Number of elements of all parameters; tied embeddings count once."""
    edges = (2 - spec.tied_embeddings) * spec.vocab * spec.hidden + spec.hidden
    return edges + spec.layers * layer_parameter_count(spec)


def layer_parameter_count(spec: ModelSpec) -> int:
    """Number of elements of one decoder layer."""
    return sum(prod(shape) for _, shape, _ in _layer_table(spec))


_Row = tuple[str, tuple[int, ...], Split | None]


@lru_cache(maxsize=64)
def _layer_table(spec: ModelSpec) -> tuple[_Row, ...]:
    """(name after `model.layers.N.`, shape, split) of every parameter of a layer."""
    table: list[_Row] = [("input_layernorm.weight", (spec.hidden,), None)]
    inputs: tuple[tuple[str, Axis, int], ...] = (
        ("q", "q_heads", spec.heads),
        ("k", "kv_heads", spec.kv_heads),
        ("v", "kv_heads", spec.kv_heads),
    )
    for name, axis, heads in inputs:
        table += _split_rows(
            f"self_attn.{name}_proj",
            heads * spec.head_dim,
            spec.hidden,
            Split(0, axis, spec.head_dim),
            spec.qkv_bias,
        )
    if spec.qk_norm:
        table += [(f"self_attn.{name}_norm.weight", (spec.head_dim,), None) for name in "qk"]
    table += _split_columns(
        "self_attn.o_proj",
        spec.hidden,
        spec.heads * spec.head_dim,
        Split(1, "q_heads", spec.head_dim),
        spec.output_bias,
    )
    table.append(("post_attention_layernorm.weight", (spec.hidden,), None))
    for name in ("gate", "up"):
        table += _split_rows(f"mlp.{name}_proj", spec.ffn, spec.hidden, Split(0, "ffn", 1), spec.mlp_bias)
    table += _split_columns("mlp.down_proj", spec.hidden, spec.ffn, Split(1, "ffn", 1), spec.mlp_bias)
    return tuple(table)


def _split_rows(name: str, rows: int, columns: int, split: Split, bias: bool) -> list[_Row]:
    """A projection whose outputs are divided: the bias is divided with them."""
    weight: list[_Row] = [(f"{name}.weight", (rows, columns), split)]
    return [*weight, (f"{name}.bias", (rows,), split)] if bias else weight


def _split_columns(name: str, rows: int, columns: int, split: Split, bias: bool) -> list[_Row]:
    """A projection whose inputs are divided: its partial sums are added up, so the bias stays whole."""
    weight: list[_Row] = [(f"{name}.weight", (rows, columns), split)]
    return [*weight, (f"{name}.bias", (rows,), None)] if bias else weight
