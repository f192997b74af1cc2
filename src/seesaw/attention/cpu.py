"""Attention on CPU ranks by the native kernel (`native/paged_attention.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.native.pointers import TensorPointer
from seesaw.native.program import NotRecordable, RecordedLibrary, Recorder

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PROBLEMS = {
    1: "a slot lies outside the pool",
    2: "a block table names a block outside the pool",
    3: "an unknown type",
    4: "query starts or context starts make no sense",
    5: "no memory for scratch space",
}


_TENSORS = 9
"""Arguments that are tensors: q, k, v, the pool, the result, and the batch as `AttentionBatch` has it."""
_COUNTS = 14
"""Strides, of which those of q, k, v and blocks count elements, and sizes."""
_TABLE_WIDTH = 14
"""The position of the one that grows with the contexts: entries of a row of the block tables."""


class CpuAttention:
    """One kernel for decode, prefill and mixed batches; K and V are read where they lie in the pool.

    Runs on the calling thread, or on `torch.get_num_threads()` OpenMP threads if that is more than one. A
    row's result depends on its query and context only: it is the same bit for bit whether a prompt is fed
    whole, in chunks or token by token, and whatever else is in the batch.
    """

    name = "cpu"
    capturable = False

    def __init__(self, library: ctypes.CDLL | RecordedLibrary) -> None:
        self._attend = library["seesaw_attend"]
        self._attend.argtypes = (
            *[TensorPointer] * _TENSORS,
            *[ctypes.c_int64] * _COUNTS,
            *[ctypes.c_int32] * 3,
            ctypes.c_float,
        )
        self._attend.restype = ctypes.c_int32

    def recorded_by(self, recorder: Recorder, table_width: str) -> CpuAttention:
        """This attention, to be called over stand-ins: `recorder` notes down its native calls. Runs are given the
        entries of a row of the block tables as the number `table_width`."""
        return CpuAttention(recorder.library(varying={("seesaw_attend", _TABLE_WIDTH): table_width}))

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
        if k.dtype != pool_layer.dtype:
            if k.is_meta:
                raise NotRecordable(f"K and V of {k.dtype} become {pool_layer.dtype} by torch")
            k, v = k.to(pool_layer.dtype), v.to(pool_layer.dtype)
        queries, q_heads, head_dim = q.shape
        blocks, _, kv_heads, block_size, _ = pool_layer.shape
        _check(q, k, v, pool_layer, batch)
        out = q.new_empty((queries, q_heads * head_dim))
        status = self._attend(
            q,
            k,
            v,
            pool_layer,
            out,
            batch.query_starts,
            batch.context_starts,
            batch.block_tables,
            batch.slot_mapping,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            blocks,
            pool_layer.stride(0),
            batch.block_tables.shape[1],
            k.shape[0],
            queries,
            batch.context_starts.shape[0],
            q_heads,
            kv_heads,
            block_size,
            head_dim,
            window or 0,
            _DTYPES[q.dtype],
            _DTYPES[pool_layer.dtype],
            torch.get_num_threads(),
            scale,
        )
        assert status == 0, f"attention over {blocks} blocks of {block_size}: {_PROBLEMS[status]}"
        return out


def _check(q: Tensor, k: Tensor, v: Tensor, pool_layer: Tensor, batch: AttentionBatch) -> None:
    """What the kernel takes for granted; it reads memory by these shapes."""
    (_, q_heads, head_dim), tokens = q.shape, k.shape[0]
    _, pair, kv_heads, block_size, _ = pool_layer.shape
    plane = block_size * head_dim
    for rows in (q, k, v):
        assert rows.stride(2) == 1 and (rows.stride(1) == head_dim or rows.shape[1] == 1), rows.stride()
    assert k.shape == v.shape == (tokens, kv_heads, head_dim), (q.shape, k.shape, v.shape)
    inner = (kv_heads * plane, plane, head_dim, 1)
    assert pair == 2 and pool_layer.stride()[1:] == inner, pool_layer.stride()
    assert pool_layer.shape[4] == head_dim and head_dim % 8 == 0 and q_heads % kv_heads == 0, q.shape
    assert batch.slot_mapping.dtype == torch.int64 and batch.slot_mapping.shape == (tokens,)
    for tensor in (batch.query_starts, batch.context_starts, batch.block_tables):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert batch.query_starts.shape[0] == batch.context_starts.shape[0] + 1 == batch.block_tables.shape[0] + 1
