"""The parameters of a checkpoint as data: names, shapes, where they live, how tensor parallelism splits them.

No torch here. Names are those of Hugging Face checkpoints (Llama, Mistral, Qwen2, Qwen3). The experts of a sparse
layer, which checkpoints store one by one, count as one tensor of each kind, with a dimension of experts in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from seesaw.core.model_spec import ModelSpec
from seesaw.core.moe import MoESpec

Axis = Literal["q_heads", "kv_heads", "ffn", "vocab", "expert_ffn", "shared_ffn"]
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

    `layer` is the decoder layer it belongs to (`place == "layer"`), else None. `matrix` says that quantised
    checkpoints store it in fewer bits: the projections of the layers, but no router.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    place: Place
    split: Split | None
    matrix: bool = False

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


def layer_parameters(spec: ModelSpec, layer: int, moe: MoESpec | None = None) -> tuple[Parameter, ...]:
    """Parameters of one decoder layer: a sparse one if `moe` says so."""
    prefix = f"model.layers.{layer}."
    table = _layer_table(spec, moe if moe and layer in moe.sparse else None)
    return tuple(
        Parameter(prefix + suffix, shape, layer, "layer", split, matrix)
        for suffix, shape, split, matrix in table
    )


def parameter_count(spec: ModelSpec) -> int:
    """Number of elements of all parameters; tied embeddings count once."""
    edges = (2 - spec.tied_embeddings) * spec.vocab * spec.hidden + spec.hidden
    return edges + spec.layers * layer_parameter_count(spec)


def layer_parameter_count(spec: ModelSpec) -> int:
    """Number of elements of one decoder layer."""
    return sum(prod(shape) for _, shape, *_ in _layer_table(spec, None))


_Row = tuple[str, tuple[int, ...], Split | None, bool]


@lru_cache(maxsize=64)
def _layer_table(spec: ModelSpec, moe: MoESpec | None) -> tuple[_Row, ...]:
    """(name after `model.layers.N.`, shape, split, matrix) of every parameter of a dense or sparse layer."""
    norms = (
        [(f"self_attn.{name}_norm.weight", (spec.head_dim,), None, False) for name in "qk"]
        if spec.qk_norm
        else []
    )
    return (
        ("input_layernorm.weight", (spec.hidden,), None, False),
        *_inputs_of_attention(spec),
        *norms,
        *_split_columns(
            "self_attn.o_proj",
            spec.hidden,
            spec.heads * spec.head_dim,
            Split(1, "q_heads", spec.head_dim),
            spec.output_bias,
        ),
        ("post_attention_layernorm.weight", (spec.hidden,), None, False),
        *(_experts(spec, moe) if moe else _feed_forward("mlp.", spec.ffn, spec.hidden, "ffn", spec.mlp_bias)),
    )


def _inputs_of_attention(spec: ModelSpec) -> list[_Row]:
    table: list[_Row] = []
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
    return table


def _feed_forward(prefix: str, width: int, hidden: int, axis: Axis, bias: bool) -> list[_Row]:
    table: list[_Row] = []
    for name in ("gate", "up"):
        table += _split_rows(f"{prefix}{name}_proj", width, hidden, Split(0, axis, 1), bias)
    return [*table, *_split_columns(f"{prefix}down_proj", hidden, width, Split(1, axis, 1), bias)]


def _experts(spec: ModelSpec, moe: MoESpec) -> list[_Row]:
    """Router, experts and, if there is one, the shared expert and its gate. Every expert's columns are divided."""
    each, hidden, width = moe.experts, spec.hidden, moe.expert_ffn
    rows, columns = Split(1, "expert_ffn", 1), Split(2, "expert_ffn", 1)
    table: list[_Row] = [
        ("mlp.gate.weight", (each, hidden), None, False),
        ("mlp.experts.gate_proj.weight", (each, width, hidden), rows, True),
        ("mlp.experts.up_proj.weight", (each, width, hidden), rows, True),
        ("mlp.experts.down_proj.weight", (each, hidden, width), columns, True),
    ]
    if moe.shared_ffn:
        table += _feed_forward("mlp.shared_expert.", moe.shared_ffn, hidden, "shared_ffn", False)
        table.append(("mlp.shared_expert_gate.weight", (1, hidden), None, False))
    return table


def _split_rows(name: str, rows: int, columns: int, split: Split, bias: bool) -> list[_Row]:
    """A projection whose outputs are divided: the bias is divided with them."""
    weight: list[_Row] = [(f"{name}.weight", (rows, columns), split, True)]
    return [*weight, (f"{name}.bias", (rows,), split, False)] if bias else weight


def _split_columns(name: str, rows: int, columns: int, split: Split, bias: bool) -> list[_Row]:
    """A projection whose inputs are divided: its partial sums are added up, so the bias stays whole."""
    weight: list[_Row] = [(f"{name}.weight", (rows, columns), split, True)]
    return [*weight, (f"{name}.bias", (rows,), None, False)] if bias else weight
