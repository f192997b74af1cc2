"""Log-probabilities of chosen tokens: tables on the device, which become `ChosenToken`s when they are on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from seesaw.core.actions import ChosenToken
from seesaw.execution.sampling.rows import Ints, Uploads, ranges

if TYPE_CHECKING:
    from seesaw.device.base import Device

TIE_ROOM = 64
"""Places beyond the last one wanted that a CPU looks at for tokens equal to it."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of consecutive rows: the `asks` of each part (most likely tokens wanted; -1: nothing), and its table.

    A table has a line for each row that asks: the chosen token's log-probability, its rank, the ids of the most
    likely tokens and their log-probabilities, as float64, which holds all of them exactly.
    """

    parts: tuple[tuple[Ints, Tensor | None], ...]

    @classmethod
    def none(cls, rows: int) -> Logprobs:
        """Of rows that do not ask."""
        return cls(((np.full(rows, -1, dtype=np.int64), None),))

    def download(self, device: Device) -> Logprobs:
        """The same with tables in host memory, whole when the compute stream has done what was launched so far."""
        return Logprobs(
            tuple((asks, None if table is None else device.download(table)) for asks, table in self.parts)
        )

    def listed(self) -> list[ChosenToken | None]:
        """One entry per row, None for those that do not ask; empty if no row asks. Tables are on the host."""
        if all(table is None for _, table in self.parts):
            return []
        return [entry for asks, table in self.parts for entry in _entries(asks, table)]


def _entries(asks: Ints, table: Tensor | None) -> list[ChosenToken | None]:
    result: list[ChosenToken | None] = [None] * len(asks)
    if table is None:
        return result
    most = (table.shape[1] - 2) // 2
    for row, line in zip(np.flatnonzero(asks >= 0).tolist(), table.tolist(), strict=True):
        ids = [int(token) for token in line[2 : 2 + most]]
        top = list(zip(ids, line[2 + most :], strict=True))[: asks[row]]
        result[row] = ChosenToken(logprob=line[0], rank=int(line[1]), top=top)
    return result


class Asking:
    """The rows of one call that want log-probabilities; `parts` are those of the batch that are worked on at once."""

    def __init__(self, asks: Ints, parts: list[slice], vocab: int, uploads: Uploads, *, ask: bool) -> None:
        """`ask` says whether it may ask the device for what it has computed."""
        self.asks, self._ask = asks, ask
        self._most = min(int(asks.max()), vocab)
        rows = np.flatnonzero(asks >= 0)
        self._ranges = ranges(rows, np.ones_like(rows), parts)
        self._places = uploads.add(rows % (parts[0].stop - parts[0].start))

    def look(self, number: int, logits: Tensor, tokens: Tensor) -> Tensor | None:
        """The table of part `number`, under its raw `logits` [m, vocab], whose chosen `tokens` are [m]."""
        start, stop = self._ranges[number]
        if start == stop:
            return None
        if stop - start < len(logits):
            places = self._places()[start:stop]
            logits, tokens = logits.index_select(0, places), tokens.index_select(0, places)
        table = logits.float().log_softmax(dim=-1)
        chosen = table.gather(1, tokens[:, None])
        # Counting in float32 (exact below 2**24) takes a tenth of the time of summing booleans on CPUs.
        ahead = torch.gt(table, chosen, out=torch.empty_like(table)).sum(dim=-1, keepdim=True)
        columns = [chosen, ahead + 1.0]
        if self._most:
            values, ids = (
                _largest_with_ties(table, self._most) if self._ask else _largest_by_key(table, self._most)
            )
            columns += [ids, values]
        return torch.cat([column.double() for column in columns], dim=1)


def _largest_by_key(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their ids, falling; among equals, lower ids first.

    By keys that no two tokens share: the bits of the number, so turned that integers have their order, above
    the id, counted from the end. NaNs are equal to each other, and larger than all else.
    """
    vocab = table.shape[1]
    bits = (table + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    bits.masked_fill_(table.isnan(), 0x7FFFFFFF)
    keys = bits.long().bitwise_left_shift_(32)
    keys += torch.arange(vocab - 1, -1, -1, device=table.device)
    ids = (vocab - 1) - keys.topk(count, dim=-1).values.bitwise_and_(0xFFFFFFFF)
    return table.gather(1, ids), ids


def _largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `_largest_by_key`, but which of several that equal the last one are taken is left open."""
    vocab = scores.shape[1]
    if width * 8 >= vocab:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values[:, :width], ids[:, :width]
    values, ids = scores.topk(width, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _largest_with_ties(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `_largest_by_key`, by looking again where several tokens equal the last one wanted: faster on a CPU."""
    width = min(count + TIE_ROOM, table.shape[1])
    while True:
        values, ids = _largest(table, width)
        if width == table.shape[1] or bool((values[:, -1] < values[:, count - 1]).all()):  # never with NaNs
            return values[:, :count], ids[:, :count]
        width = min(width * 8, table.shape[1])
