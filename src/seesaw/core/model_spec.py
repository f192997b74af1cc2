"""`ModelSpec`: the shape of a decoder, free of torch, from which shards, memory and costs follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base frequency and scaling.

    `kind` is `default`, `linear`, `llama3` or `yarn`; the fields a kind does not use keep their defaults.
    Names and meanings are those of Hugging Face `rope_parameters`.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense decoder-only transformer (Llama 2/3, Mistral, Qwen2/2.5, Qwen3).

    All sizes are element counts. `sliding_window[i]` is the attention window of layer i in tokens (a token
    sees itself and the `window - 1` before it), or `None` for full attention.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_position: int
    rms_eps: float
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: tuple[int | None, ...] = ()
    dtype: DType = "bfloat16"
    """Type of the checkpoint's weights as its config states it."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Attention window of `layer` in tokens, or None."""
        return self.sliding_window[layer] if self.sliding_window else None

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers and KV heads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]
