"""Numbers for the tests of operators, and how near two results must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same rows, further apart."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def steps(x: Tensor) -> Tensor:
    """Numbers of x's type in order: neighbours differ by one, and so do those around zero."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
    lowest = -(1 << (31 if x.dtype == torch.float32 else 15))
    return torch.where(bits < 0, lowest - bits, bits)


def assert_near(got: Tensor, wanted: Tensor, *, ulps: int = 1, slack: float = 0.0) -> None:
    """Equal in shape and type, and no further apart than `ulps` units in the last place, or `slack`."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    near = (steps(got) - steps(wanted)).abs() <= ulps
    near |= (got.double() - wanted.double()).abs() <= slack
    near |= got.isnan()
    worst = (got.double() - wanted.double()).abs().max() if near.numel() else 0.0
    assert near.all(), f"{int((~near).sum())} of {near.numel()} differ, by up to {worst}"


def ulps_of(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float32 else 1


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()).to(x.dtype)
