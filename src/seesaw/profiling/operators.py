"""Operators as the engine's ranks run them: products, attention over the paged pool, norms and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.attention.select import create_attention
from seesaw.ops.select import create_operators
from seesaw.profiling.clock import Call
from seesaw.profiling.operands import Operands, random_tensor

BLOCK_SIZE = 16
_POOL_LAYERS = 16
_VIEWS = 256
"""Layers that attention is measured over in turn, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Of the rank whose attention is measured."""

    query: int
    kv: int
    dim: int


def product_calls(
    operands: Operands, dtype: str, rows: int, products: Sequence[tuple[int, int]]
) -> list[Call]:
    """`rows` rows by the weights of a layer, (depth, columns) of each, which have left the caches when their turn
    comes."""
    kind: torch.dtype = getattr(torch, dtype)
    linear = create_operators(operands.device, dtype=kind).linear
    x = {depth: random_tensor((rows, depth), kind, operands.device) for depth, _ in products}
    layers = operands.cut_sets([(columns, depth) for depth, columns in products], kind)

    def layer(weights: list[Tensor]) -> None:
        for weight in weights:
            linear(x[weight.shape[1]], weight)

    return [partial(layer, weights) for weights in layers]


def evicting(operands: Operands, dtype: str) -> Call:
    """A product that reads a few MiB of weights, others each time, as those before any operator of a decode step."""
    kind: torch.dtype = getattr(torch, dtype)
    linear = create_operators(operands.device, dtype=kind).linear
    x = random_tensor((8, 1024), kind, operands.device)
    turn = cycle(operands.cut((4096, 1024), kind))
    return lambda: linear(x, next(turn))


def tiny_calls(operands: Operands, dtype: str) -> list[Call]:
    """Operators with next to nothing to do: a product, a norm, a rotation, SwiGLU."""
    kind: torch.dtype = getattr(torch, dtype)
    device = operands.device
    operators = create_operators(device, dtype=kind)
    x, delta, heads = (random_tensor((1, 32), kind, device) for _ in range(3))
    weight, norm = random_tensor((32, 32), kind, device), torch.ones(32, dtype=kind, device=device)
    cosines, sines = (torch.full((1, 16), value, device=device) for value in (0.8, 0.6))
    return [
        partial(operators.linear, x, weight),
        partial(operators.add_rms_norm, x, delta, norm, 1e-5),
        partial(operators.rotate, heads.view(1, 1, 32), cosines, sines),
        partial(operators.silu_mul, delta),
    ]


def attention_calls(
    operands: Operands, dtype: str, heads: Heads, sequences: int, tokens: int, new: int
) -> list[Call]:
    """Attention of `sequences` sequences that have `tokens` tokens, the last `new` of them fed now, over one layer of
    the pool after another."""
    kind: torch.dtype = getattr(torch, dtype)
    device = operands.device
    attention = create_attention(device, head_dim=heads.dim, dtype=kind)
    width = -(-tokens // BLOCK_SIZE)
    blocks = sequences * width
    layers = _pool_layers(operands, (2, heads.kv, BLOCK_SIZE, heads.dim), blocks, kind)
    batch = _batch(sequences, tokens, new, device)
    mixed = random_tensor((sequences * new, heads.query + 2 * heads.kv, heads.dim), kind, device)
    q, k, v = torch.split(mixed, [heads.query, heads.kv, heads.kv], dim=1)
    attend = partial(attention.attend, q, k, v, batch=batch, scale=heads.dim**-0.5, window=None)
    return [partial(attend, pool_layer=layer) for layer in layers]


def _pool_layers(operands: Operands, slab: tuple[int, ...], blocks: int, kind: torch.dtype) -> list[Tensor]:
    """Layers of pools as the engine has them: a block holds its slabs of all layers side by side."""
    fitting = operands.bytes // (blocks * torch.Size(slab).numel() * kind.itemsize)
    count = max(1, min(_POOL_LAYERS, fitting))
    pools = operands.cut((blocks, count, *slab), kind, most=-(-_VIEWS // count))
    return [pool[:, layer] for pool in pools for layer in range(count)]


def _batch(sequences: int, tokens: int, new: int, device: str) -> AttentionBatch:
    """Blocks lie in random order, as in a pool that has been in use."""
    width = -(-tokens // BLOCK_SIZE)
    tables = torch.randperm(sequences * width).view(sequences, width)
    positions = torch.arange(tokens - new, tokens)
    mapping = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionBatch(
        query_starts=torch.arange(0, (sequences + 1) * new, new, dtype=torch.int32, device=device),
        context_starts=torch.full((sequences,), tokens - new, dtype=torch.int32, device=device),
        block_tables=tables.to(device, torch.int32),
        slot_mapping=mapping.reshape(-1).to(device),
        max_query=new,
        fresh=tokens == new,
        host_lengths=(np.full(sequences, new), np.full(sequences, tokens - new)),
    )


def activation_calls(
    operands: Operands, dtype: str, heads: Heads, rows: int, hidden: int, ffn: int
) -> list[Call]:
    """What a layer does beside products and attention: two norms with their residuals, rotation, SwiGLU."""
    kind: torch.dtype = getattr(torch, dtype)
    device = operands.device
    operators = create_operators(device, dtype=kind)
    channels = (heads.query + 2 * heads.kv) * heads.dim
    state, delta = (random_tensor((rows, hidden), kind, device) for _ in range(2))
    mixed = random_tensor((rows, channels), kind, device)
    turning = mixed[:, : (heads.query + heads.kv) * heads.dim].view(rows, -1, heads.dim)
    cosines, sines = (torch.full((rows, heads.dim // 2), x, device=device) for x in (0.8, 0.6))
    gates = random_tensor((rows, 2 * ffn), kind, device)
    weight = torch.ones(hidden, dtype=kind, device=device)

    def layer() -> None:
        for _ in range(2):
            operators.add_rms_norm(state, delta, weight, 1e-5)
        operators.rotate(turning, cosines, sines)
        operators.silu_mul(gates)

    return [layer]
