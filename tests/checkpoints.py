"""Small random Hugging Face checkpoints with awkward shapes, and greedy generation by transformers on them.

Weights have enough spread that the most likely token is well ahead and that what is generated varies, so that
an engine that confuses two positions, layers or heads gives other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

_COMMON: dict[str, Any] = {
    "vocab_size": 263,
    "intermediate_size": 101,
    "num_hidden_layers": 5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "llama3": {
        "model_type": "llama",
        "hidden_size": 80,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": 90,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 64,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 90,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 270,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 94,
    },
}
"""Config of each kind of checkpoint, over `_COMMON`. All have at least 5 query heads and 5 layers."""


def make_checkpoint(
    directory: Path | str,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Path:
    """Write `config.json`, `generation_config.json` and safetensors files of `family` into `directory`.

    `overrides` replace keys of the config. With `max_shard_size` (bytes, or text such as "100KB") the
    weights are spread over several files with an index. The same arguments give the same weights. Returns
    `directory`.
    """
    settings = {**_COMMON, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    module: Any = model
    module.to(dtype).save_pretrained(directory, **options)
    return Path(directory)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean, spread = _distribution(name, parameter)
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))


def _distribution(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    if name == "model.norm.weight":
        return 0.0, 1.0  # centred, lest tied embeddings make every token predict itself
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.6, 0.3
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith("bias"):
        return 0.0, 0.3
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 0.5
    return 0.0, 1.6 / math.sqrt(parameter.shape[1])


@lru_cache(maxsize=16)
def _model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    return model


def reference_model(path: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as a transformers model that computes in `dtype`; loaded once per path."""
    return _model(str(Path(path).resolve()), dtype)


def reference_generate(
    path: Path | str, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations in float32: `max_new_tokens` ids each, past any end-of-sequence token."""
    return [_continue(path, prompt, max_new_tokens)[0] for prompt in prompts]


def clear_prompts(
    path: Path | str, lengths: Sequence[int], max_new_tokens: int, *, seed: int = 0, margin: float = 1e-3
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of these lengths and their greedy continuations, all free of near ties.

    The most likely token leads the next by at least `margin` in logits at every step, some ten times what two
    correct float32 computations differ by; so any engine must give exactly these continuations.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = reference_model(path).config.vocab_size
    prompts: list[list[int]] = []
    continuations: list[list[int]] = []
    for length in lengths:
        lead = 0.0
        while lead < margin:
            prompt = torch.randint(vocab, (length,), generator=generator).tolist()
            continuation, lead = _continue(path, prompt, max_new_tokens)
        prompts.append(prompt)
        continuations.append(continuation)
    return prompts, continuations


def _continue(path: Path | str, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
    """Greedy continuation and the smallest lead of a chosen token over the next most likely one."""
    model: Any = reference_model(path)
    tokens = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())
