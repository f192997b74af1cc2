"""Sharded decoders in one process: weights cut out of a transformers state dict, ranks as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.models.decoder import Decoder
from seesaw.ops.base import Operators
from seesaw.ops.torch_ops import TorchOperators
from seesaw.weights.sharding import RankView, Sharding, rank_view

_T = TypeVar("_T")


def views(
    spec: ModelSpec, layout: Layout, stages: tuple[range, ...], carried: tuple[int, ...] = ()
) -> list[list[RankView]]:
    """`views(...)[stage][tp]` of a layout with one replica, rank i at coordinate i."""
    sharding = Sharding(layout, stages, tuple(range(layout.world)), carried)
    flat = [rank_view(spec, sharding, rank) for rank in range(layout.world)]
    return [flat[stage * layout.tp :][: layout.tp] for stage in range(layout.pp)]


def sliced(spec: ModelSpec, view: RankView, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The device tensors of one rank, cut out of a Hugging Face state dict."""
    vocab = slice(view.vocab.start, view.vocab.stop)
    weights: dict[str, Tensor] = {}
    if view.first_stage:
        weights["embed.weight"] = state["model.embed_tokens.weight"][vocab]
    if view.last_stage:
        weights["norm.weight"] = state["model.norm.weight"]
        if not (spec.tied_embeddings and view.first_stage):
            weights["head.weight"] = state["lm_head.weight"][vocab]
    held = [(layer, view.ffn) for layer in view.layers]
    held[-1] = held[-1][0], view.last_ffn or view.ffn
    if view.carried:
        held.insert(0, (view.layers.start - 1, view.carried))
    for layer, ffn in held:
        of_layer = {k.split(".", 3)[3]: v for k, v in state.items() if f"layers.{layer}." in k}
        for name, tensor in _layer(spec, view, of_layer, ffn).items():
            if layer in view.layers or name.startswith(("post_norm", "gate_up", "down.weight")):
                weights[f"layers.{layer}.{name}"] = tensor
    return weights


def _layer(spec: ModelSpec, view: RankView, state: Mapping[str, Tensor], columns: range) -> dict[str, Tensor]:
    q = slice(view.q_heads.start * spec.head_dim, view.q_heads.stop * spec.head_dim)
    kv = slice(view.kv_heads.start * spec.head_dim, view.kv_heads.stop * spec.head_dim)
    ffn = slice(columns.start, columns.stop)
    weights = {
        "input_norm.weight": state["input_layernorm.weight"],
        "post_norm.weight": state["post_attention_layernorm.weight"],
        "o.weight": state["self_attn.o_proj.weight"][:, q],
        "down.weight": state["mlp.down_proj.weight"][:, ffn],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in state:
            parts = [state[f"self_attn.{n}_proj.{kind}"][s] for n, s in (("q", q), ("k", kv), ("v", kv))]
            weights[f"qkv.{kind}"] = torch.cat(parts)
        if f"mlp.gate_proj.{kind}" in state:
            weights[f"gate_up.{kind}"] = torch.cat(
                [state[f"mlp.{n}_proj.{kind}"][ffn] for n in ("gate", "up")]
            )
    for ours, theirs in (
        ("o.bias", "self_attn.o_proj.bias"),
        ("down.bias", "mlp.down_proj.bias"),
        ("q_norm.weight", "self_attn.q_norm.weight"),
        ("k_norm.weight", "self_attn.k_norm.weight"),
    ):
        if theirs in state:
            weights[ours] = state[theirs]
    return weights


class DenseAttend:
    """Causal attention of whole sequences, packed one after another; `lengths` are theirs in tokens.

    `sampled_rows` are the packed rows that `sampled` calls are about.
    """

    def __init__(
        self, spec: ModelSpec, view: RankView, lengths: list[int], sampled_rows: Tensor | None = None
    ) -> None:
        self.spec, self.view, self.lengths = spec, view, lengths
        self.sampled_rows = sampled_rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sampled: bool = False) -> Tensor:
        if sampled:
            q = torch.zeros(len(k), *q.shape[1:]).index_copy_(0, self.sampled_rows, q)
        assert q.shape[1:] == (len(self.view.q_heads), self.spec.head_dim)
        assert k.shape[1:] == v.shape[1:] == (len(self.view.kv_heads), self.spec.head_dim)
        group = self.spec.heads // self.spec.kv_heads
        serving = [head // group - self.view.kv_heads.start for head in self.view.q_heads]
        k, v = k[:, serving], v[:, serving]
        parts = [
            self._sequence(layer, *part)
            for part in zip(*(torch.split(x, self.lengths) for x in (q, k, v)), strict=True)
        ]
        mixed = torch.cat(parts).flatten(1)
        return mixed[self.sampled_rows] if sampled else mixed

    def _sequence(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.spec.head_dim**-0.5
        place = torch.arange(len(q))
        distance = place[:, None] - place[None, :]
        window = self.spec.window(layer)
        hidden = (distance < 0) | (distance >= (window or len(q)))
        shares = scores.float().masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
        return torch.einsum("hqk,khd->qhd", shares, v)


class ThreadSum:
    """All-reduce between threads: every rank leaves its part, waits, and adds all up in the same order."""

    def __init__(self, ranks: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)

    def of(self, index: int) -> _RankSum:
        return _RankSum(self, index)


class _RankSum:
    def __init__(self, shared: ThreadSum, index: int) -> None:
        self.shared, self.index = shared, index

    def all_reduce(self, x: Tensor) -> Tensor:
        self.shared.parts[self.index] = x.clone()
        self.shared.barrier.wait()
        total = torch.stack(self.shared.parts).sum(0)
        self.shared.barrier.wait()
        return x.copy_(total)

    def linear(self, operators: Operators, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.all_reduce(operators.linear(x, weight, bias))


def run_logits(
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    sequences: list[list[int]],
    layout: Layout | None = None,
    stages: tuple[range, ...] | None = None,
    sampled_rows: Tensor | None = None,
    carried: tuple[int, ...] = (),
) -> Tensor:
    """Logits `[all tokens, vocab]` of packed sequences, computed under a layout (unsharded by default); with
    `sampled_rows`, of these packed rows only."""
    grid = views(spec, layout or Layout(), stages or (range(spec.layers),), carried)
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = torch.empty(0)
    for stage in grid:
        shared = ThreadSum(len(stage))

        def rank(view: RankView, before: Tensor = hidden, shared: ThreadSum = shared) -> Tensor:
            decoder = Decoder(
                spec, view, sliced(spec, view, state), shared.of(view.coordinate.tp), TorchOperators()
            )
            start = decoder.embed(tokens) if view.first_stage else before.clone()
            attend = DenseAttend(spec, view, lengths, sampled_rows)
            out = decoder.layers(start, positions, attend, sampled_rows=sampled_rows)
            return decoder.logits(out) if view.last_stage else out

        outs = _in_threads(stage, rank)
        hidden = outs[0]
    return torch.cat(outs, dim=1)


def _in_threads(stage: list[RankView], work: Callable[[RankView], _T]) -> list[_T]:
    with ThreadPoolExecutor(len(stage)) as pool:
        return list(pool.map(work, stage))
