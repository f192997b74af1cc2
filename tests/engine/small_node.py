"""A model and a profile so small and so plain that the planner's answer is known, for the tests of `plan="auto"`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from seesaw import Request, SamplingParams
from seesaw.core.hardware import Curve, HardwareSpec
from tests.planning.machines import hardware, line

VOCAB = 263
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device_memory": "600KiB",  # the weights have 606 KiB: no rank holds all of them
    "host_kv": "1536KiB",
    "max_model_len": 128,
    "max_running": 16,
    "chunk": 32,
}


def node(**changes: Any) -> HardwareSpec:
    """Two ranks on which the answer is plain.

    All-reduces are cheap for decode steps and dear for prefill: P2->T2 where outputs are long. The way from the
    host is slow: where they are short, nothing is worth a transition, and P2 is best.
    """
    small: dict[str, Any] = {
        "ranks": 2,
        "flops": {"float32": 1e9},
        "bandwidth": 1e7,
        "all_reduce": {2: Curve((3200.0, 6000.0), (1e-4, 2e-2))},
        "send": line(1e-5, 1e9),
        "to_device": 3e5,
        "to_host": 3e5,
        "node_to_device": 6e5,
        "node_to_host": 6e5,
    }
    return hardware(**(small | changes))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("plan auto")]


def rows(count: int, output: int, prompt: int = 60) -> Iterator[Request]:
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for i in range(count):
        tokens = tuple(3 + (7 * i + 3 * j) % 250 for j in range(prompt))
        yield Request(id=str(i), prompt_token_ids=tokens, sampling=sampling)
