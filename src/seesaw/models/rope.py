"""Rotary position embedding: frequencies of every supported kind, and the angles of a batch.

The arithmetic follows transformers step by step, in float32, so that results agree to the last bit.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from seesaw.core.model_spec import RopeSpec


class Rotation(NamedTuple):
    """Cosines and sines of one batch of positions, each float32 `[N, head_dim / 2]`."""

    cos: Tensor
    sin: Tensor


def rotation(rope: RopeSpec, head_dim: int, positions: Tensor) -> Rotation:
    """Cosines and sines for `positions` (`[N]`, int64), once per pass through a stage.

    They are computed rather than looked up: next to one layer this costs nothing, any position is served, no
    table occupies device memory, and the device need not be asked for the largest position.
    """
    frequencies = inverse_frequencies(rope, head_dim, positions.device)
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    scale = attention_factor(rope)
    if scale != 1.0:
        cos, sin = cos.mul_(scale), sin.mul_(scale)
    return Rotation(cos, sin)


@lru_cache(maxsize=64)
def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device) -> Tensor:
    """Angle per position of each channel pair: `[head_dim / 2]`, float32, on `device`."""
    with torch.inference_mode(False):
        return _frequencies(rope, head_dim).to(device)


def attention_factor(rope: RopeSpec) -> float:
    """Factor on cosines and sines: 1 except for yarn."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, wavelengths)
    return plain


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Slow channels are slowed down by the factor, fast ones kept, those between blended."""
    trained, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    period = 2 * math.pi / plain
    scaled = torch.where(period > trained / low, plain / rope.factor, plain)
    blend = (trained / period - low) / (high - low)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = ~(period < trained / high) & ~(period > trained / low)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec, head_dim: int, wavelengths: Tensor) -> Tensor:
    """Channels blend from kept to slowed along a ramp between two numbers of rotations."""

    def channel(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return (1.0 / (rope.factor * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep
