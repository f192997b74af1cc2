"""What ranks say to each other: tensor-parallel collectives and the links of the pipeline, over a transport."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from seesaw.core.partial_sums import part_bounds
from seesaw.execution.links import HIDDEN, TOKENS
from seesaw.ops.base import Operators
from seesaw.transport.base import Transport, has_partial_sums
from seesaw.weights.sharding import RankView


@dataclass(frozen=True, slots=True)
class TensorParallelGroup:
    """The ranks that share the layers of one stage of one replica."""

    view: RankView
    transport: Transport

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks, in place."""
        return self.transport.all_reduce(x, self.view.tp_ranks)

    def linear(self, operators: Operators, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`, summed over the ranks.

        Where the transport can, the sums of some columns travel while the next are computed.
        """
        rows, columns = len(x), len(weight)
        transport, members = self.transport, self.view.tp_ranks
        bounds = part_bounds(rows, columns, x.element_size(), len(members))
        if len(bounds) == 2 or not has_partial_sums(transport):
            return self.all_reduce(operators.linear(x, weight, bias))
        sums = x.new_empty(rows * columns)
        parts = [sums[rows * a : rows * b].view(rows, b - a) for a, b in pairwise(bounds)]

        def compute(i: int) -> None:
            a, b = bounds[i], bounds[i + 1]
            operators.linear(x, weight[a:b], None if bias is None else bias[a:b], out=parts[i])

        transport.all_reduce_in_parts(sums, [part.numel() for part in parts], compute, members)
        return operators.join_columns(parts)

    def agree(self, mine: bool, device: torch.device) -> bool:
        """Whether it holds on every rank. The host waits for them, and for its own `device`."""
        if len(self.view.tp_ranks) == 1:
            return mine
        return not self.all_reduce(torch.tensor([float(not mine)], device=device)).item()

    def gather_logits(self, local: Tensor, widths: list[int]) -> Tensor | None:
        """Logits `[M, vocab]` on tensor-parallel index 0 from `[M, widths[i]]` on index i; None elsewhere."""
        if len(widths) == 1:
            return local
        narrower = max(widths) - local.shape[1]
        if narrower:
            local = pad(local, (0, narrower))
        parts = self.transport.gather(local.contiguous(), self.view.tp_ranks)
        if parts is None:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def gather_best(self, scores: Tensor, tokens: Tensor) -> Tensor | None:
        """The best token of each row on tensor-parallel index 0, from each rank's own best; None elsewhere.

        `scores` and `tokens` are `[M]`: the largest logit among the rank's part of the vocabulary, and its
        token. Of equal scores the lowest token wins, and a NaN wins over all.
        """
        if len(self.view.tp_ranks) == 1:
            return tokens
        # float64 holds every score of the types we compute in, and every token, exactly
        parts = self.transport.gather(torch.stack([scores.double(), tokens.double()]), self.view.tp_ranks)
        if parts is None:
            return None
        both = torch.stack(parts)
        best = both[:, 0].argmax(dim=0, keepdim=True)
        return both[:, 1].gather(0, best)[0].long()

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens of tensor-parallel index 0 on every rank, in place."""
        if len(self.view.tp_ranks) == 1:
            return tokens
        return self.transport.broadcast(tokens, self.view.tp_ranks)


@dataclass(frozen=True, slots=True)
class PipelineLinks:
    """Messages between stages: hidden states forward, sampled tokens from the last stage to the first.

    Rank i of a stage's tensor-parallel group talks to rank i of the next one; hidden states are whole on each.
    """

    view: RankView
    transport: Transport
    device: torch.device

    def send_hidden(self, hidden: Tensor) -> None:
        """Hand hidden states to the next stage without waiting for it."""
        assert self.view.next_rank is not None
        self.transport.send(hidden, self.view.next_rank, HIDDEN)

    def receive_hidden(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Hidden states `[rows, width]` from the previous stage; `[2, rows, width]` if an FFN is shared with it."""
        shape = (2, rows, width) if self.view.carried else (rows, width)
        return self.fill_hidden(torch.empty(shape, dtype=dtype, device=self.device))

    def fill_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states from the previous stage, into `hidden`."""
        assert self.view.previous_rank is not None
        return self.transport.receive(hidden, self.view.previous_rank, HIDDEN)

    def send_tokens(self, tokens: Tensor) -> None:
        """Hand sampled tokens to every rank of the first stage without waiting for them."""
        for rank in self.view.first_stage_ranks:
            self.transport.send(tokens, rank, TOKENS)

    def receive_tokens(self, count: int) -> Tensor:
        """`count` sampled tokens from the last stage."""
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        return self.transport.receive(tokens, self.view.sampler_rank, TOKENS)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        self.transport.flush()
