"""Attention in pure torch: the reference, and the fallback where no native kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seesaw.attention.base import AttentionBatch

_QUERY_TILE = 512
"""Query tokens per call: bounds the mask of a long prompt."""


class TorchAttention:
    """Gathers the pages of one sequence at a time and calls torch's fused attention."""

    name = "torch"
    capturable = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool_layer: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        write_tokens(k, v, pool_layer, batch.slot_mapping)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        starts, contexts = batch.query_starts.tolist(), batch.context_starts.tolist()
        for index, context in enumerate(contexts):
            first, end = starts[index], starts[index + 1]
            keys, values = gather(pool_layer, batch.block_tables[index], context + end - first)
            for tile in range(first, end, _QUERY_TILE):
                stop = min(tile + _QUERY_TILE, end)
                position = context + tile - first
                out[tile:stop] = _attend(
                    q[tile:stop], keys, values, position=position, scale=scale, window=window
                )
        return out.flatten(1)


def write_tokens(k: Tensor, v: Tensor, pool_layer: Tensor, slot_mapping: Tensor) -> None:
    """Put `k` and `v`, `[N, kv_heads, head_dim]`, into their slots of the pool."""
    block_size = pool_layer.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    pool_layer[blocks, 0, :, offsets] = k.to(pool_layer.dtype)
    pool_layer[blocks, 1, :, offsets] = v.to(pool_layer.dtype)


def gather(pool_layer: Tensor, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first `tokens` tokens of a sequence, each `[kv_heads, tokens, head_dim]`."""
    block_size = pool_layer.shape[3]
    pages = pool_layer[table[: -(-tokens // block_size)]]
    heads = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
    return heads[0], heads[1]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, *, position: int, scale: float, window: int | None
) -> Tensor:
    """Attention of queries `[n, q_heads, head_dim]` at `position`…; returns the same shape."""
    end = position + q.shape[0]
    begin = 0 if window is None else max(0, position - window + 1)
    places = torch.arange(position, end, device=q.device)[:, None]
    tokens = torch.arange(begin, end, device=q.device)
    mask = tokens <= places
    if window is not None:
        mask &= tokens > places - window
    group = q.shape[1] // keys.shape[0]
    mixed = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None, :, begin:end].to(q.dtype).repeat_interleave(group, 1),
        values[None, :, begin:end].to(q.dtype).repeat_interleave(group, 1),
        attn_mask=mask,
        scale=scale,
    )
    return mixed[0].transpose(0, 1)
