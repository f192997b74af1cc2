"""Attention on CUDA devices by FlashInfer, where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seesaw.attention import triton_decode
from seesaw.attention.base import AttentionBatch
from seesaw.attention.triton_backend import TritonAttention

WORKSPACE_BYTES = 128 << 20
"""For partial results of split sequences: what FlashInfer's documentation recommends."""
HEAD_DIMS = (64, 128, 256)
_LEAST_GROUP_FOR_TENSOR_CORES = 4


@dataclass(frozen=True, slots=True)
class _Pages:
    """A batch in FlashInfer's terms. All but `indices` are host tensors: planning asks nothing of the device."""

    queries: Tensor
    """int32 `[B + 1]`: first query of each sequence."""
    starts: Tensor
    """int32 `[B + 1]`: first of each sequence's pages in `indices`."""
    indices: Tensor
    """int32: blocks of all sequences one after another, on the device."""
    last: Tensor
    """int32 `[B]`: tokens in each sequence's last page."""


class FlashInferAttention:
    """FlashInfer's paged kernels over the pool as it is: an HND page whose strides skip the other layers.

    FlashInfer divides a batch among the SMs on the host, once for a batch and kind of window, at the first layer
    that needs it. That cannot be captured in a CUDA graph: a batch of a graph is served by `own`, as are types that
    FlashInfer lacks. How it divides depends on the whole batch; so the last bits of a result may, too.
    """

    name = "flashinfer"
    capturable = True

    def __init__(self, library: Any, own: TritonAttention) -> None:
        """`library` is the module `flashinfer`."""
        self._library, self._own = library, own
        self._workspace: Tensor | None = None
        self._wrappers: dict[tuple[str, int | None], Any] = {}
        self._planned: dict[tuple[str, int | None], AttentionBatch] = {}
        self._pages: tuple[AttentionBatch, _Pages] | None = None

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
        if not len(q) or batch.padded or not _serves(q, pool_layer) or _capturing(q):
            return self._own.attend(q, k, v, pool_layer, batch, scale=scale, window=window)
        triton_decode.store_tokens(k, v, pool_layer, batch.slot_mapping)
        wrapper = self._wrapper(q, pool_layer, batch, scale, window)
        result: Tensor = wrapper.run(q, pool_layer)
        return result.flatten(1)

    def _wrapper(
        self, q: Tensor, pool_layer: Tensor, batch: AttentionBatch, scale: float, window: int | None
    ) -> Any:
        """FlashInfer's object that has planned this batch.

        Each kind of window has its own, since a plan lives in its buffers. Layers of one pool share shapes, types and
        scale, so the batch alone says whether a plan still holds.
        """
        decoding = batch.max_query == 1 and len(q) == len(batch.context_starts)
        key = ("decode" if decoding else "prefill", window)
        if key not in self._wrappers:
            self._wrappers[key] = self._create(decoding, q.shape[1] // pool_layer.shape[2], q.device)
        wrapper = self._wrappers[key]
        if self._planned.get(key) is not batch:
            self._plan(wrapper, decoding, q, pool_layer, batch, scale, window)
            self._planned[key] = batch
        return wrapper

    def _create(self, decoding: bool, group: int, device: torch.device) -> Any:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        if decoding:
            tensor_cores = group >= _LEAST_GROUP_FOR_TENSOR_CORES
            return self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "HND", use_tensor_cores=tensor_cores
            )
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")

    def _plan(
        self,
        wrapper: Any,
        decoding: bool,
        q: Tensor,
        pool_layer: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> None:
        if self._pages is None or self._pages[0] is not batch:
            self._pages = batch, _pages(batch, pool_layer.shape[3])
        pages = self._pages[1]
        _, q_heads, head_dim = q.shape
        kv_heads, block_size = pool_layer.shape[2:4]
        paging = (pages.starts, pages.indices, pages.last, q_heads, kv_heads, head_dim, block_size)
        options = {
            "sm_scale": scale,
            "window_left": -1 if window is None else window - 1,
            "q_data_type": q.dtype,
            "kv_data_type": pool_layer.dtype,
        }
        if decoding:
            wrapper.plan(*paging, **options)
        else:
            wrapper.plan(pages.queries, *paging, causal=True, **options)


def _pages(batch: AttentionBatch, block_size: int) -> _Pages:
    """Queries and contexts from the host's copy of them, if the batch has one: else the device is waited for."""
    if batch.host_lengths is not None:
        counts, contexts = batch.host_lengths
    else:
        counts = np.diff(batch.query_starts.cpu().numpy())
        contexts = batch.context_starts.cpu().numpy()
    ends = np.asarray(contexts, dtype=np.int64) + counts
    pages = -(-ends // block_size)
    starts = np.concatenate([[0], np.cumsum(pages)])
    rows = np.repeat(np.arange(len(pages)), pages)
    columns = np.arange(starts[-1]) - starts[rows]
    places = torch.from_numpy(rows * batch.block_tables.shape[1] + columns)
    if batch.block_tables.is_cuda:
        places = places.pin_memory().to(batch.block_tables.device, non_blocking=True)
    return _Pages(
        queries=_host_int32(np.concatenate([[0], np.cumsum(counts)])),
        starts=_host_int32(starts),
        indices=batch.block_tables.view(-1)[places],
        last=_host_int32(ends - np.maximum(pages - 1, 0) * block_size),
    )


def _host_int32(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _serves(q: Tensor, pool_layer: Tensor) -> bool:
    known = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == pool_layer.dtype
    return known and q.shape[2] in HEAD_DIMS


def _capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()
