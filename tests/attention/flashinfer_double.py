"""What is used of FlashInfer, as its documentation has it, in plain torch: checks what it is told, and computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Wrapper:
    """The pages and options of the last plan. Like FlashInfer's, host tensors are copied when planned."""

    plans = 0

    def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8 and len(workspace) == 128 << 20 and layout == "HND"
        assert set(options) <= {"use_tensor_cores"}

    def _plan(
        self,
        queries: Tensor,
        starts: Tensor,
        indices: Tensor,
        last: Tensor,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        options: dict[str, Any],
    ) -> None:
        type(self).plans += 1
        for tensor in (queries, starts, indices, last):
            assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert len(queries) == len(starts) == len(last) + 1 and len(indices) == starts[-1]
        pages = starts.diff()
        assert ((last >= 1) & (last <= page_size))[pages > 0].all()
        assert set(options) <= {"causal", "sm_scale", "window_left", "q_data_type", "kv_data_type"}
        self._queries, self._starts, self._indices, self._last = (
            x.clone() for x in (queries, starts, indices, last)
        )
        self._shape, self._options = (q_heads, kv_heads, page_size, head_dim), options

    def run(self, q: Tensor, paged_kv_cache: Tensor) -> Tensor:
        q_heads, kv_heads, page_size, head_dim = self._shape
        assert q.shape == (self._queries[-1], q_heads, head_dim) and q.dtype == self._options["q_data_type"]
        assert paged_kv_cache.shape[1:] == (2, kv_heads, page_size, head_dim)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for b, tail in enumerate(self._last.tolist()):
            pages = paged_kv_cache[self._indices[self._starts[b] : self._starts[b + 1]].long()]
            heads = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)
            tokens = (len(pages) - 1) * page_size + tail
            rows = slice(int(self._queries[b]), int(self._queries[b + 1]))
            out[rows] = self._attend(q[rows], heads[:, :, :tokens]).to(q.dtype)
        return out

    def _attend(self, q: Tensor, heads: Tensor) -> Tensor:
        keys, values = heads.double().repeat_interleave(q.shape[1] // heads.shape[1], 1)
        scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * self._options["sm_scale"]
        distance = torch.arange(keys.shape[1] - len(q), keys.shape[1])[:, None] - torch.arange(keys.shape[1])
        hidden = distance < 0
        if self._options["window_left"] >= 0:
            hidden |= distance > self._options["window_left"]
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    plans = 0

    def plan(self, queries: Tensor, *paging: Any, **options: Any) -> None:
        assert options["causal"] is True
        self._plan(queries, *paging, options)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    plans = 0

    def plan(self, *paging: Any, **options: Any) -> None:
        self._plan(torch.arange(len(paging[0]), dtype=torch.int32), *paging, options)
