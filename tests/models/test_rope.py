"""Rotary frequencies and their application against transformers, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from seesaw.core.model_spec import RopeSpec
from seesaw.models.rope import attention_factor, inverse_frequencies, rotation
from seesaw.ops.torch_ops import TorchOperators

_CPU = torch.device("cpu")
_NAMES = {
    "kind": "rope_type",
    "theta": "rope_theta",
    "original_max_position": "original_max_position_embeddings",
}
_YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 2048}
_KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"theta": 1e6},
    "linear": {"kind": "linear", "factor": 2.5},
    "llama3": {
        "kind": "llama3",
        "theta": 5e5,
        "factor": 8.0,
        "original_max_position": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": _YARN,
    "yarn-betas": {**_YARN, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-not-truncated": {**_YARN, "truncate": False},
    "yarn-mscale": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-mscale-alone": {**_YARN, "mscale": 0.7},
    "yarn-attention-factor": {**_YARN, "attention_factor": 1.25},
    "yarn-narrow-ramp": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def _reference(settings: dict[str, Any], head_dim: int) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    parameters.update({_NAMES.get(key, key): value for key, value in settings.items()})
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("kind", list(_KINDS))
def test_frequencies_equal_those_of_transformers(kind: str, head_dim: int) -> None:
    reference = _reference(_KINDS[kind], head_dim)
    rope = RopeSpec(**_KINDS[kind])
    assert torch.equal(inverse_frequencies(rope, head_dim, _CPU), reference.inv_freq)
    assert attention_factor(rope) == reference.attention_scaling


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
def test_rotation_equals_that_of_transformers(kind: str) -> None:
    """Also far beyond any table, for positions in any order and with repeats, and for strided rows."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(6, 5, 64, generator=generator)
    positions = torch.tensor([7, 0, 7, 100_000, 131_071, 1])
    cos, sin = _reference(_KINDS[kind], 64)(fused, positions[None])
    expected, _ = apply_rotary_pos_emb(fused[:, :3], fused[:, :3], cos[0], sin[0])
    turn = rotation(RopeSpec(**_KINDS[kind]), 64, positions)
    untouched = fused[:, 3:].clone()
    rotated = TorchOperators().rotate(fused[:, :3], turn.cos, turn.sin)
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(fused[:, 3:], untouched)


def test_angles_are_those_of_transformers() -> None:
    positions = torch.tensor([0, 1001, 90_001])
    cos, sin = _reference({}, 64)(torch.empty(0), positions[None])
    turn = rotation(RopeSpec(), 64, positions)
    assert torch.equal(turn.cos, cos[0, :, :32])
    assert torch.equal(turn.sin, sin[0, :, :32])
