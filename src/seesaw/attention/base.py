"""The protocol of attention backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the sequences of one micro-batch lie. Built once per Forward and used by every layer.

    B sequences with Q queries in all, on the device of the pool, every tensor contiguous. Commonly each of the
    N new tokens has a query; where not, the queries of a sequence are those of its last tokens. No block belongs to
    two sequences.
    """

    query_starts: Tensor
    """int32 `[B + 1]`: sequence b's queries are `query_starts[b] .. query_starts[b + 1]` of Q."""
    context_starts: Tensor
    """int32 `[B]`: the position of the sequence's first query."""
    block_tables: Tensor
    """int32 `[B, blocks]`: device blocks in order of position, new tokens included; rows are padded."""
    slot_mapping: Tensor
    """int64 `[N]`: `block * block_size + offset`, where K and V of each new token go."""
    max_query: int
    """Most queries of a sequence."""
    fresh: bool = False
    """Whether every new token has a query and no sequence has a token before them: K and V beside q are all."""
    padded: bool = False
    """Whether it is a batch of a CUDA graph, or of a step that makes one ready: the last sequences may have no query
    (Q is more than `query_starts` says then, and those rows of the result may be anything) and negative slots. Only
    `capturable` backends get such batches, and do nothing for them that a graph cannot hold."""
    host_lengths: tuple[IntArray, IntArray] | None = None
    """Queries and context start of each sequence, `[B]` each, for backends that plan on the host. A batch without
    them makes such a backend wait for the device."""


class AttentionBackend(Protocol):
    """Causal attention over the paged pool."""

    name: str
    capturable: bool
    """Whether a CUDA graph can hold calls with a `max_query` of 1, and serve whatever the tensors of the batch hold
    when it is replayed. Such a backend serves batches that are `padded`."""

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
        """Write `k` and `v` of the new tokens into the pool, then attend over each sequence's whole context.

        `q` is `[Q, q_heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]`, after rotary embedding; rows
        may be strided, heads and channels are contiguous. Query head h reads KV head `h * kv_heads //
        q_heads`; `q_heads` is a multiple of `kv_heads` and `head_dim` of 8. `pool_layer` is `[blocks, 2,
        kv_heads, block_size, head_dim]`, contiguous within a block. Types are float32, bfloat16 or float16;
        sums are float32. A token sees itself and, with a `window`, the `window - 1` tokens before it.

        Returns `[Q, q_heads * head_dim]`, contiguous, in q's type. A sequence's result does not depend on the
        other sequences of the batch.
        """
        ...
