"""Batches of sequences in a paged pool, and a float64 reference that knows no pages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch

# rounding of inputs excluded: what sums, weights in the type, and the rounded result may add
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """Sequences with `contexts[b]` tokens in the pool and `counts[b]` new ones."""

    contexts: list[int]
    counts: list[int]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(self.device, self.dtype)

        totals = [a + b for a, b in zip(self.contexts, self.counts, strict=True)]
        needed = [-(-total // self.block_size) for total in totals]
        order = torch.randperm(sum(needed) + 2, generator=random).int()
        self.tables = torch.split(order[: sum(needed)], needed)
        self.q = [normal(total, self.q_heads, self.head_dim) for total in totals]
        self.k = [normal(total, self.kv_heads, self.head_dim) for total in totals]
        self.v = [normal(total, self.kv_heads, self.head_dim) for total in totals]
        # three layers, of which the middle one is used; NaN wherever nothing was written
        shape = (sum(needed) + 2, 3, 2, self.kv_heads, self.block_size, self.head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        for index, context in enumerate(self.contexts):
            self._fill(index, context)

    def _fill(self, index: int, context: int) -> None:
        tokens = torch.arange(context)
        blocks = self.tables[index][tokens // self.block_size].long().to(self.device)
        offsets = (tokens % self.block_size).to(self.device)
        self.pool[blocks, 1, 0, :, offsets] = self.k[index][:context]
        self.pool[blocks, 1, 1, :, offsets] = self.v[index][:context]

    def batch(self, contexts: list[int], counts: list[int]) -> AttentionBatch:
        width = max(map(len, self.tables)) + 1
        padded = torch.full((len(counts), width), 1 << 30, dtype=torch.int32)
        slots = []
        for index, table in enumerate(self.tables):
            padded[index, : len(table)] = table
            tokens = torch.arange(contexts[index], contexts[index] + counts[index])
            slots.append(table[tokens // self.block_size].long() * self.block_size + tokens % self.block_size)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        return AttentionBatch(
            starts.to(self.device),
            torch.tensor(contexts, dtype=torch.int32, device=self.device),
            padded.to(self.device),
            torch.cat(slots).to(self.device),
            max(counts),
            fresh=not any(contexts),
            host_lengths=(np.array(counts), np.array(contexts)),
        )

    def run(self, backend: AttentionBackend) -> list[Tensor]:
        """Results per sequence, `[count, q_heads * head_dim]`; the pool is written."""
        return self.feed(backend, self.contexts, self.counts)

    def feed(self, backend: AttentionBackend, contexts: list[int], counts: list[int]) -> list[Tensor]:
        def packed(rows: list[Tensor]) -> Tensor:
            return torch.cat([x[a : a + n] for x, a, n in zip(rows, contexts, counts, strict=True)])

        # rows of one fused tensor, as a projection leaves them
        fused = torch.cat([packed(self.q), packed(self.k), packed(self.v)], dim=1)
        q, k, v = torch.split(fused, [self.q_heads, self.kv_heads, self.kv_heads], dim=1)
        batch, scale = self.batch(contexts, counts), self.head_dim**-0.5
        out = backend.attend(q, k, v, self.pool[:, 1], batch, scale=scale, window=self.window)
        assert out.is_contiguous() and out.dtype == self.dtype
        assert out.shape == (sum(counts), self.q_heads * self.head_dim)
        return list(torch.split(out, counts))

    def expected(self, index: int) -> Tensor:
        """Results of the new tokens, `[count, q_heads * head_dim]`, in float64."""
        group, context = self.q_heads // self.kv_heads, self.contexts[index]
        q, k, v = (x[index].cpu().double().transpose(0, 1) for x in (self.q, self.k, self.v))
        scores = q[:, context:] @ k.repeat_interleave(group, 0).transpose(1, 2) * self.head_dim**-0.5
        distance = torch.arange(context, k.shape[1])[:, None] - torch.arange(k.shape[1])
        hidden = (distance < 0) | (distance >= (self.window or 1 << 30))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed: Tensor = (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        return mixed

    def check(self, backend: AttentionBackend) -> None:
        for index, result in enumerate(self.run(backend)):
            torch.testing.assert_close(
                result.cpu().double(), self.expected(index), rtol=0, atol=TOLERANCE[self.dtype]
            )


DECODE = {
    "mixed lengths": Case([100, 0, 63, 64, 320], [1] * 5, q_heads=2, kv_heads=1),
    "one sequence": Case([200], [1], q_heads=1, kv_heads=1),
    "groups of 4, head of 64": Case([150, 9], [1, 1], q_heads=4, kv_heads=1, head_dim=64),
    "groups of 8, head of 128, blocks of 32": Case(
        [70, 140], [1, 1], q_heads=8, kv_heads=1, head_dim=128, block_size=32
    ),
    "no groups, head of 80": Case([90, 5], [1, 1], q_heads=3, kv_heads=3, head_dim=80),
    "odd group, head of 96, blocks of 5": Case([70], [1], q_heads=14, kv_heads=2, head_dim=96, block_size=5),
    "window": Case([300, 0, 130], [1] * 3, q_heads=2, kv_heads=1, window=100),
    "window of one": Case([70], [1], window=1),
    "some with nothing": Case([30, 40, 7], [0, 1, 0]),
}
SEVERAL = {
    "prompts": Case([0, 0, 0], [100, 1, 65], q_heads=4, kv_heads=1),
    "chunks and decode": Case([150, 0, 7, 64], [1, 40, 33, 2]),
    "groups of 8, head of 128, blocks of 32": Case(
        [40, 3], [20, 1], q_heads=8, kv_heads=1, head_dim=128, block_size=32
    ),
    "no groups, head of 80": Case([40, 0], [3, 70], q_heads=2, kv_heads=2, head_dim=80),
    "odd group": Case([50], [30], q_heads=7, kv_heads=1),
    "some with nothing": Case([30, 40, 7], [0, 2, 0]),
    "wide group": Case([20], [3], q_heads=64, kv_heads=1),
    "window": Case([200, 0, 40], [40, 90, 1], q_heads=4, kv_heads=1, window=50),
    "window of one": Case([70], [10], window=1),
    "window longer than all": Case([20], [10], window=4096),
}


def other_neighbours(case: Case, kept: int) -> Case:
    """A batch whose sequence `kept` is the same, at another index, among others of other lengths."""
    contexts, counts = [99, case.contexts[kept], 2], [1, case.counts[kept], 1]
    other = dataclasses.replace(case, contexts=contexts, counts=counts, seed=case.seed + 1)
    for rows in ("q", "k", "v"):
        getattr(other, rows)[1] = getattr(case, rows)[kept]
    other._fill(1, other.contexts[1])
    return other
