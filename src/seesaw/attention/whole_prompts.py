"""Torch's variable-length flash attention, for batches of prompts that have nothing in the pool yet."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def find_whole_prompts(head_dim: int | None) -> Callable[..., Tensor] | str:
    """Flash attention (`triton_backend.WholePrompts`) as this torch offers it, or why there is none.

    `torch.nn.attention.varlen.varlen_attn` where it takes grouped heads, a scale and a window; before, and as far
    back as torch 2.6, the operator that it calls. A head may have up to 256 channels, in eights.
    """
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"torch's flash attention takes heads of up to 256 channels in eights, not {head_dim}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    return by_varlen_attn() or by_operator() or "this torch has no flash attention for packed sequences"


def by_varlen_attn() -> Callable[..., Tensor] | None:
    """Through the public function, if it can do all that is needed."""
    try:
        varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        left = -1 if window is None else window - 1
        result: Tensor = varlen_attn(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0),
            enable_gqa=True,
        )
        return result

    return attend


def by_operator() -> Callable[..., Tensor] | None:
    """Through the operator below it, which takes grouped heads by itself."""
    operator: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None:
        return None
    names = {argument.name for argument in operator.default._schema.arguments}
    if not {"cum_seq_q", "scale", "window_size_left", "window_size_right"} <= names:
        return None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        results: tuple[Tensor, ...] = operator(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=0,
        )
        return results[0]

    return attend
