"""What ranks say to each other: tensor-parallel collectives and the links of the pipeline."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from seesaw.weights.sharding import RankView

_HIDDEN, _TOKENS = 1, 2
"""Message tags: hidden states to the next stage, sampled tokens to the first."""


def join_world(*, rank: int, world: int, rendezvous: str, timeout: float) -> None:
    """Meet the other ranks through the file `rendezvous`. Raises after `timeout` seconds without them."""
    if world > 1:
        store = FileStore(rendezvous, world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )


class Groups:
    """Process groups by member ranks; each is made once, by all ranks in the same order."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], Any] = {}

    def make(self, members: tuple[int, ...]) -> None:
        """Make the group of these ranks, in tensor-parallel order. Every rank of the world calls this."""
        if len(members) > 1 and members not in self._groups:
            ordered = sorted(members)
            key = tuple(ordered)
            if key not in self._groups:
                self._groups[key] = dist.new_group(ordered)
            self._groups[members] = self._groups[key]

    def get(self, members: tuple[int, ...]) -> Any:
        """The group of these ranks; None for a single rank."""
        return self._groups.get(members)


@dataclass(slots=True)
class TensorParallelGroup:
    """The ranks that share the layers of one stage of one replica."""

    view: RankView
    group: Any

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def gather_logits(self, local: Tensor, widths: list[int]) -> Tensor | None:
        """Logits `[M, vocab]` on tensor-parallel index 0 from `[M, widths[i]]` on rank i; None elsewhere."""
        if self.group is None:
            return local
        widest = max(widths)
        if local.shape[1] < widest:
            local = torch.nn.functional.pad(local, (0, widest - local.shape[1]))
        local = local.contiguous()
        root = self.view.tp_ranks[0]
        if self.view.rank != root:
            dist.gather(local, dst=root, group=self.group)
            return None
        ordered = sorted(self.view.tp_ranks)
        by_rank = {rank: torch.empty_like(local) for rank in ordered}
        dist.gather(local, [by_rank[rank] for rank in ordered], dst=root, group=self.group)
        return torch.cat([by_rank[r][:, :w] for r, w in zip(self.view.tp_ranks, widths, strict=True)], dim=1)

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens of tensor-parallel index 0 on every rank, in place."""
        if self.group is not None:
            dist.broadcast(tokens, src=self.view.tp_ranks[0], group=self.group)
        return tokens


@dataclass(slots=True)
class PipelineLinks:
    """Messages between stages: hidden states forward, sampled tokens from the last stage to the first."""

    view: RankView
    _sending: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    """Sends in progress with the tensors they read."""

    def send_hidden(self, hidden: Tensor) -> None:
        """Hand hidden states to the next stage without waiting for it."""
        assert self.view.next_rank is not None
        self._send(hidden, self.view.next_rank, _HIDDEN)

    def receive_hidden(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Hidden states `[rows, width]` from the previous stage."""
        assert self.view.previous_rank is not None
        hidden = torch.empty(rows, width, dtype=dtype)
        dist.recv(hidden, src=self.view.previous_rank, tag=_HIDDEN)
        return hidden

    def send_tokens(self, tokens: Tensor) -> None:
        """Hand sampled tokens to every rank of the first stage without waiting for them."""
        for rank in self.view.first_stage_ranks:
            self._send(tokens, rank, _TOKENS)

    def receive_tokens(self, count: int) -> Tensor:
        """`count` sampled tokens from the last stage."""
        tokens = torch.empty(count, dtype=torch.int64)
        dist.recv(tokens, src=self.view.sampler_rank, tag=_TOKENS)
        return tokens

    def flush(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _send(self, tensor: Tensor, rank: int, tag: int) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self._sending.append((dist.isend(tensor, dst=rank, tag=tag), tensor))
