"""Attention on CUDA devices by Triton kernels of our own, and torch's flash attention for whole prompts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seesaw.attention import triton_decode
from seesaw.attention.base import AttentionBatch
from seesaw.attention.triton_prefill import prefill

_PROGRAMS_PER_PROCESSOR = 4
"""More than are resident at once on most devices: equal shares then run in waves that need not end together."""


class WholePrompts(Protocol):
    """Causal attention of packed sequences to themselves, without a pool."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        """`q` `[N, q_heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]`, `starts` int32 `[B + 1]`.

        Returns q's shape.
        """
        ...


class TritonAttention:
    """Prompts without a context by `whole_prompts` where it serves; everything else over the pool.

    Over the pool, a sequence with one query goes through split-KV decode, any other through the prefill kernel,
    each by its own number of queries, so that its result is the same bit for bit whatever else is in the batch.
    Nothing waits for the device or asks it for a length: any batch whose `max_query` is 1 can be captured in
    a CUDA graph, which then serves whatever the tensors of the batch hold when it is replayed (rows to be
    ignored may have no query, or a negative slot for what they write).
    """

    name = "triton"
    capturable = True

    def __init__(
        self,
        processors: int,
        *,
        whole_prompts: WholePrompts | None = None,
        chunk: int = triton_decode.CHUNK,
    ) -> None:
        """For a device with so many streaming multiprocessors; decode takes `chunk` tokens in one piece at least."""
        self._programs = _PROGRAMS_PER_PROCESSOR * processors
        self._chunk = chunk
        self._whole_prompts = whole_prompts

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
        triton_decode.store_tokens(k, v, pool_layer, batch.slot_mapping)
        return self.read(q, k, v, pool_layer, batch, scale=scale, window=window)

    def read(
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
        """`attend` for tokens that are in the pool already."""
        if self._whole_prompts is not None and batch.fresh and batch.max_query > 1 and _same_16_bit(q, k, v):
            longest = batch.max_query
            return self._whole_prompts(q, k, v, batch.query_starts, longest, scale, window).flatten(1)
        queries, q_heads, head_dim = q.shape
        out = torch.empty((queries, q_heads * head_dim), dtype=q.dtype, device=q.device)
        if batch.max_query > 1:
            prefill(q, pool_layer, batch, out, scale=scale, window=window)
        triton_decode.decode(
            q,
            pool_layer,
            batch,
            out,
            scale=scale,
            window=window,
            programs=self._programs,
            chunk=self._chunk,
        )
        return out


def _same_16_bit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
