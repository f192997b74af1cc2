"""A backend's first calls, when it is chosen: what cannot be compiled or run here fails then, not in a job."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch

_BLOCK_SIZE = 16
_Q_HEADS, _KV_HEADS = 4, 1


def try_backend(
    backend: AttentionBackend, device: str, head_dim: int, dtype: torch.dtype | None = None
) -> None:
    """Attend from two tokens, then from one more. Raises what the backend raises, `RuntimeError` if it is wrong."""
    dtype = dtype or torch.bfloat16
    pool = torch.zeros((2, 2, _KV_HEADS, _BLOCK_SIZE, head_dim), dtype=dtype, device=device)
    for context, count in ((0, 2), (2, 1)):
        q = torch.ones((count, _Q_HEADS, head_dim), dtype=dtype, device=device)
        k = torch.ones((count, _KV_HEADS, head_dim), dtype=dtype, device=device)
        with _current(device):
            out = backend.attend(q, k, k, pool, _batch(context, count, device), scale=1.0, window=None)
        _expect_ones(out)


def try_whole_prompts(
    attend: Callable[..., Tensor], device: str, head_dim: int, dtype: torch.dtype | None = None
) -> None:
    """Attend from two packed sequences. Raises what `attend` raises, `RuntimeError` if it is wrong."""
    q = torch.ones((5, _Q_HEADS, head_dim), dtype=dtype or torch.bfloat16, device=device)
    k = q[:, :_KV_HEADS].contiguous()
    starts = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    with _current(device):
        _expect_ones(attend(q, k, k, starts, 3, 1.0 / head_dim, None))


def _current(device: str) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def _batch(context: int, count: int, device: str) -> AttentionBatch:
    return AttentionBatch(
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_starts=torch.tensor([context], dtype=torch.int32, device=device),
        block_tables=torch.ones((1, 1), dtype=torch.int32, device=device),
        slot_mapping=torch.arange(context, context + count, device=device) + _BLOCK_SIZE,
        max_query=count,
        host_lengths=(np.array([count]), np.array([context])),
    )


def _expect_ones(out: Tensor) -> None:
    """The mean of equal values is that value."""
    if not bool((out == 1).all()):
        raise RuntimeError("a wrong result in a trial of a few tokens")
