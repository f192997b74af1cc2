"""Memory that operands are cut from: far more than caches hold, filled once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_PATTERN = 1_048_573
"""Random elements that are repeated: a prime, so that rows differ. Constant data would be multiplied faster on
accelerators that save power by it."""


class Operands:
    """`size` bytes on `device`, seen as random numbers of one type after another. Nothing owns its cuts."""

    def __init__(self, size: int, device: str) -> None:
        self.device = device
        self.bytes = size
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._dtype: torch.dtype | None = None

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype, most: int | None = None) -> list[Tensor]:
        """As many tensors of `shape` as fit beside each other, at least one; `most` limits them."""
        numbers, each = self._numbers(dtype), prod(shape)
        assert each <= len(numbers), (shape, dtype, len(numbers))
        count = min(len(numbers) // each, most or len(numbers))
        return [numbers[i * each : (i + 1) * each].view(shape) for i in range(count)]

    def cut_sets(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
        """As many sets of tensors of these shapes as fit, at least one."""
        each = sum(map(prod, shapes))
        return [_split(whole, shapes) for whole in self.cut((each,), dtype)]

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        numbers = self.memory.view(dtype)
        if dtype != self._dtype:
            self._dtype = dtype
            pattern = (torch.randn(_PATTERN, device=self.device) * 0.1).to(dtype)
            for start in range(0, len(numbers), _PATTERN):
                part = numbers[start : start + _PATTERN]
                part.copy_(pattern[: len(part)])
        return numbers


def _split(whole: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = torch.split(whole, [prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Small random numbers."""
    return (torch.randn(shape, device=device) * 0.1).to(dtype)
