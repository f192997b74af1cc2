"""Choosing tokens from logits, on the rank that holds the whole vocabulary of a replica.

A row goes through these steps, in the order vLLM (V1) takes them:

1. log-probabilities, if asked for: log-softmax of the model's own logits, before everything below;
2. penalties: repetition (over prompt and output, each distinct token once: positive logits are divided by it,
   others multiplied), then frequency (times the token's count in the output), then presence (output only);
3. `min_tokens`: the logits of the stop tokens become -inf until that many tokens are there;
4. temperature 0 (below 1e-5): the most likely token, the lowest id among equals;
5. otherwise temperature, then min-p (drop what is less probable than `min_p` times the most probable token),
   then top-k (keep the k largest and whatever equals the k-th), then top-p on what is left (the smallest set
   of most probable tokens that reaches `top_p` of the remaining probability; among equals, lower ids first);
   Hugging Face's `generate` applies min-p last instead, which differs only where min-p and top-p meet;
6. one token by inversion of the cumulative distribution in order of token ids.

Step 6 takes one number per token from a counter-based generator: output number `index` of SplitMix64 seeded
with the sequence's `noise_key`, where `index` counts the sequence's own tokens from 0. There is no generator
state. Which row or batch a sequence sits in, and under which layout, changes nothing: every operation works
on a row by itself, and which code path a row takes follows from its own parameters.

On a device that runs behind the host, nothing waits for it: what is done follows from the parameters, which the host
knows, and what follows from logits is decided on the device. Tokens and tables of log-probabilities stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from seesaw.core.actions import SamplingState
from seesaw.device.cpu import CpuDevice
from seesaw.execution.sampling.drawing import Draws
from seesaw.execution.sampling.histories import Histories, Penalties
from seesaw.execution.sampling.logprobs import Asking, Logprobs
from seesaw.execution.sampling.rows import (
    CLOSED,
    CUSTOM,
    PLAIN,
    ROW,
    Ints,
    Rows,
    Uploads,
    asked,
    drawn,
    opened,
    penalised,
    ranges,
    waiting,
)

if TYPE_CHECKING:
    from seesaw.device.base import Device

CHUNK_ELEMENTS = 1 << 20
"""Rows are worked on in chunks of about this many logits, so that temporaries stay small (8 MiB each at most)."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What one call of `Sampler.sample` chose.

    `tokens`: int64 [M], on the device of the logits. `logprobs`: of the M rows, with tables on that device; None if
    no row asks.
    """

    tokens: Tensor
    logprobs: Logprobs | None

    @classmethod
    def joined(cls, parts: list[SampleResult]) -> SampleResult:
        """One result of those of consecutive rows."""
        if len(parts) == 1:
            return parts[0]
        logprobs = None
        if any(part.logprobs is not None for part in parts):
            each = [part.logprobs or Logprobs.none(len(part.tokens)) for part in parts]
            logprobs = Logprobs(tuple(entry for one in each for entry in one.parts))
        return cls(torch.cat([part.tokens for part in parts]), logprobs)


class Sampler:
    """Chooses the next tokens of the sequences of one replica, which are known by their slots.

    It keeps what a sequence's choices depend on (parameters, number of tokens so far, history for penalties)
    and advances it with every sampled token. Plain greedy slots keep nothing. Not thread-safe.
    """

    def __init__(
        self,
        vocab: int,
        argmax: Callable[[Tensor], Tensor] | None = None,
        device: Device | None = None,
    ) -> None:
        """`vocab` is the number of logits per row; `argmax` is that of the device's `Operators` (default: torch).

        `device` is where the logits are (default: a CPU); on one that runs behind, `sample` does not wait for it.
        """
        assert vocab >= 1
        self._vocab = vocab
        self._argmax = argmax or _argmax
        self._device = device or CpuDevice()
        self._ask = not self._device.runs_behind
        self._rows: Rows = np.zeros(64, dtype=ROW)
        self._histories = Histories(vocab, self._device)
        self._banned: dict[int, list[int]] = {}

    def open(self, slot: int, state: SamplingState | None) -> None:
        """Start a sequence in a closed slot, or continue it after `generated` tokens; None: plain greedy."""
        if slot >= len(self._rows):
            more = max(len(self._rows), slot + 1 - len(self._rows))
            self._rows = np.concatenate([self._rows, np.zeros(more, dtype=ROW)])
        assert self._rows[slot]["state"] == CLOSED, f"slot {slot} is open"
        if state is None:
            self._rows[slot]["state"] = PLAIN
            return
        self._rows[slot] = opened(state, self._vocab)
        if self._rows[slot]["penalised"]:
            self._histories.open(slot, state.prompt, state.output)
        if state.generated < state.min_tokens:
            self._banned[slot] = [token for token in state.stop_token_ids if token < self._vocab]

    def close(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self._rows[slot]["state"] = CLOSED
        self._histories.close(slot)
        self._banned.pop(slot, None)

    @torch.no_grad()
    def sample(self, logits: Tensor, slots: list[int]) -> SampleResult:
        """Choose one token per row and advance the sequences.

        `logits`: [M, vocab] of any float type, left as it is; `slots`: the M distinct open slots of its rows.
        A row whose logits hold a NaN, or nothing but -inf, gets its argmax.
        """
        assert logits.shape == (len(slots), self._vocab), f"{tuple(logits.shape)} logits, {len(slots)} slots"
        index = np.asarray(slots, dtype=np.int64)
        rows = self._rows[index]
        assert rows["state"].all(), "a slot is not open"
        if not (rows["state"] == CUSTOM).any():
            return SampleResult(self._argmax(logits), None)
        call = self._prepare(slots, rows)
        if call.penalties is not None:
            call.penalties.write()
        tokens = torch.cat(
            [self._choose(call, number, logits[part]) for number, part in enumerate(call.parts)]
        )
        logprobs = None if call.asking is None else _look(call.asking, call.parts, logits, tokens)
        if call.penalties is not None:
            call.penalties.advance(tokens)
        self._rows["generated"][index] += 1
        return SampleResult(tokens, logprobs)

    def _prepare(self, slots: list[int], rows: Rows) -> _Call:
        """What the call does with which rows, on the device in one upload."""
        step = max(1, CHUNK_ELEMENTS // self._vocab)
        parts = [slice(start, min(start + step, len(slots))) for start in range(0, len(slots), step)]
        uploads = Uploads(self._device)
        by_chance, asks = drawn(rows), asked(rows)
        seen, early = np.flatnonzero(penalised(rows)), np.flatnonzero(waiting(rows))
        penalties, bans, draws, asking = None, None, None, None
        if len(seen):
            of = [slots[row] for row in seen]
            penalties = self._histories.prepare(seen, of, rows[seen], parts, uploads)
        if len(early):
            banned = [self._banned[slots[row]] for row in early]
            bans = _Bans(early, banned, parts, self._vocab, uploads)
        if by_chance.any():
            draws = Draws(rows, by_chance, parts, self._vocab, uploads, ask=self._ask)
        if (asks >= 0).any():
            asking = Asking(asks, parts, self._vocab, uploads, ask=self._ask)
        uploads.send()
        return _Call(parts, penalties, bans, draws, asking)

    def _choose(self, call: _Call, number: int, logits: Tensor) -> Tensor:
        """Tokens of one part of the batch."""
        scores = logits
        if call.changes(number):
            scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if call.penalties is not None:
                call.penalties.penalise_(number, logits, scores)
            if call.bans is not None:
                call.bans.apply_(number, scores)
        tokens = self._argmax(scores)
        return tokens if call.draws is None else call.draws.draw_(number, scores, tokens)


class _Bans:
    """Tokens that rows may not sample yet."""

    def __init__(
        self, rows: Ints, tokens: list[list[int]], parts: list[slice], vocab: int, uploads: Uploads
    ) -> None:
        """Row `rows[i]` of the batch, in rising order, may not sample `tokens[i]`."""
        counts = np.asarray([len(banned) for banned in tokens])
        self.ranges = ranges(rows, counts, parts)
        bases = np.repeat(rows % (parts[0].stop - parts[0].start) * vocab, counts)
        flat = np.asarray([token for banned in tokens for token in banned], dtype=np.int64)
        self._places = uploads.add(bases + flat)

    def apply_(self, number: int, scores: Tensor) -> None:
        """Set their `scores` [m, vocab] in part `number` to -inf."""
        start, stop = self.ranges[number]
        if start < stop:
            scores.view(-1).index_fill_(0, self._places()[start:stop], -torch.inf)


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call does, by `parts` of its batch; None where no row wants it."""

    parts: list[slice]
    penalties: Penalties | None
    bans: _Bans | None
    draws: Draws | None
    asking: Asking | None

    def changes(self, number: int) -> bool:
        """Whether logits of that part are changed before a token is chosen."""
        return any(
            one is not None and one.ranges[number][0] < one.ranges[number][1]
            for one in (self.penalties, self.bans)
        )


def _look(asking: Asking, parts: list[slice], logits: Tensor, tokens: Tensor) -> Logprobs:
    tables = [asking.look(number, logits[part], tokens[part]) for number, part in enumerate(parts)]
    return Logprobs(((asking.asks, torch.cat([table for table in tables if table is not None])),))


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)
