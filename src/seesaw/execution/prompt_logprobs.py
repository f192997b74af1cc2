"""Log-probabilities of prompt tokens, on the last stage: each rank looks through its own part of the vocabulary.

A prompt has thousands of tokens and a vocabulary 150,000, so logits are neither kept nor sent: `logit_rows` of
them are made at a time, and of a row only what is asked for travels between ranks: a sum of exponentials, how
many tokens are ahead, the most likely ones. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import torch
from torch import Tensor

from seesaw.core.actions import ChosenToken, Forward, ForwardDone, PromptScore
from seesaw.core.workspace import logit_rows
from seesaw.device.base import Device
from seesaw.execution.collectives import TensorParallelGroup

_CHUNK_ELEMENTS = 1 << 22
"""Logits that are looked through at a time. The float32 copy of them, its exponentials and its comparisons are
up to 12 bytes for each: below `core.workspace.SAMPLING_BYTES`, which the sampler does not use meanwhile."""
_OWN, _SUM, _AHEAD, _BEST = range(4)
"""Rows of a table of one rank: the token's logit, the logarithm of the sum of exponentials, how many logits are
larger, and from `_BEST` on the largest ones, then their tokens."""


class PromptScorer:
    """Scores the prompts of a `Forward`; one for each rank of the last stage, and all of them take part."""

    def __init__(
        self,
        vocab: int,
        group: TensorParallelGroup,
        device: Device,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        """`logits` makes `[M, vocab_local]` logits of `[M, hidden]` rows."""
        self._vocab, self._group, self._device, self._logits = vocab, group, device, logits
        self._step = logit_rows(vocab)

    def score(self, forward: Forward, hidden: Tensor) -> Tensor | None:
        """`[2 + 2 * top, R]`, float64, for the R tokens of `forward.scores` in their order; None but on
        tensor-parallel index 0.

        `hidden` is `[N, hidden]`, of all tokens of the Forward. Rows of the result are log-probabilities and
        ranks of the tokens, then log-probabilities of the `top` most likely ones, falling, and their ids, where
        `top` is the largest asked for; of equals the lower id comes first.
        """
        top = min(max(score.top for score in forward.scores), self._vocab)
        rows, tokens = self._device.upload(list(_places(forward)))
        parts = []
        for start in range(0, len(rows), self._step):
            part = slice(start, start + self._step)
            local = self._logits(hidden.index_select(0, rows[part]))
            parts.append(self._table(local, tokens[part], top))
        tables = self._gather(torch.cat(parts, dim=1))
        return None if tables is None else _joined(tables, top)

    def _table(self, local: Tensor, tokens: Tensor, top: int) -> Tensor:
        """This rank's table `[_BEST + 2 * top, M]`, float64, of its logits `[M, vocab_local]`."""
        vocab = self._group.view.vocab
        own = self._sum(_own_logits(local, tokens - vocab.start))
        step = max(1, _CHUNK_ELEMENTS // local.shape[1])
        chunks = [slice(start, start + step) for start in range(0, len(tokens), step)]
        return torch.cat([_look_through(local[c], own[c], vocab.start, top) for c in chunks], dim=1)

    def _sum(self, own: Tensor) -> Tensor:
        """Every token's logit on every rank: all but one of them have 0 for it."""
        return self._group.all_reduce(own) if len(self._group.view.tp_ranks) > 1 else own

    def _gather(self, table: Tensor) -> list[Tensor] | None:
        members = self._group.view.tp_ranks
        return [table] if len(members) == 1 else self._group.transport.gather(table, members)


def _places(forward: Forward) -> tuple[np.ndarray, np.ndarray]:
    """Packed rows of a Forward whose successors are scored, and these successors; int64."""
    starts = np.cumsum(forward.counts, dtype=np.int64) - forward.counts
    rows = [starts[s.item] + s.first + np.arange(len(s.tokens)) for s in forward.scores]
    return np.concatenate(rows), np.concatenate([np.asarray(s.tokens, np.int64) for s in forward.scores])


def _own_logits(local: Tensor, columns: Tensor) -> Tensor:
    """`[M]` in float32: the logits at these columns, 0 for columns that are not here."""
    here = (columns >= 0) & (columns < local.shape[1])
    found = local.gather(1, columns.clamp(0, local.shape[1] - 1)[:, None])[:, 0].float()
    return torch.where(here, found, 0.0)


def _look_through(local: Tensor, own: Tensor, first: int, top: int) -> Tensor:
    """The table of a few rows; `first` is the token of column 0."""
    logits = local.to(torch.float32, copy=True)
    # counting in float32 is exact below 2**24, and takes a tenth of the time of summing booleans on CPUs
    ahead = torch.gt(logits, own[:, None], out=torch.empty_like(logits)).sum(dim=-1)
    columns = [own.double(), logits.logsumexp(dim=-1).double(), ahead.double()]
    values, tokens = [], []
    for _ in range(top):
        best = logits.argmax(dim=-1, keepdim=True)
        values.append(logits.gather(1, best)[:, 0].double())
        tokens.append((best[:, 0] + first).double())
        logits.scatter_(1, best, -torch.inf)
    return torch.stack(columns + values + tokens)


def _joined(tables: list[Tensor], top: int) -> Tensor:
    """The answer, from the ranks' tables in the order of their vocabulary."""
    whole = torch.stack(tables)
    total = whole[:, _SUM].logsumexp(dim=0)
    values = whole[:, _BEST : _BEST + top].flatten(0, 1)
    tokens = whole[:, _BEST + top :].flatten(0, 1)
    values, order = values.sort(dim=0, descending=True, stable=True)
    tokens = tokens.gather(0, order)
    answer = [(whole[0, _OWN] - total)[None], whole[:, _AHEAD].sum(dim=0, keepdim=True) + 1]
    return torch.cat([*answer, values[:top] - total, tokens[:top]])


def with_prompt_logprobs(
    report: Callable[[], ForwardDone], answer: Tensor, scores: list[PromptScore]
) -> ForwardDone:
    """`report` with what `PromptScorer.score` answered, once that has come to the host."""
    top = (len(answer) - 2) // 2
    rows = iter(answer.t().tolist())
    found = []
    for score in scores:
        for logprob, rank, *best in (next(rows) for _ in score.tokens):
            pairs = zip((int(token) for token in best[top:]), best[:top], strict=True)
            found.append(ChosenToken(logprob, int(rank), list(pairs)[: score.top]))
    return msgspec.structs.replace(report(), prompt_logprobs=found)
