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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seesaw.core.actions import ChosenToken, SamplingState

_CLOSED, _PLAIN, _CUSTOM = 0, 1, 2
_GREEDY_BELOW = 1e-5
_CHUNK_ELEMENTS = 1 << 20
"""Rows are worked on in chunks of about this many logits, so that temporaries stay small (8 MiB each at most)."""
_SUM_WIDTH = 256
"""Weights are summed in groups of this many before the exact cumulative sum over groups."""
_TIE_ROOM = 64
"""Places beyond the k-th largest that are looked at for tokens equal to it."""

_ROW = np.dtype(
    [
        ("state", "u1"),
        ("penalised", "?"),
        ("temperature", "f4"),
        ("top_p", "f8"),
        ("top_k", "i8"),
        ("min_p", "f4"),
        ("repetition", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("noise_key", "u8"),
        ("logprobs", "i8"),
        ("min_tokens", "i8"),
        ("generated", "i8"),
    ]
)

_Rows = npt.NDArray[np.void]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What one call of `Sampler.sample` chose.

    `tokens`: int64 [M], on the device of the logits. `logprobs`: one entry per row, None for rows that do not
    ask; empty if no row asks.
    """

    tokens: Tensor
    logprobs: list[ChosenToken | None]


def uniforms(keys: npt.NDArray[np.uint64], indexes: _Ints) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per (key, index): the top 52 bits of output `index` of SplitMix64(`key`)."""
    with np.errstate(over="ignore"):
        bits = keys + (indexes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    mantissa: npt.NDArray[np.float64] = (bits >> np.uint64(12)).astype(np.float64)
    return (mantissa + 0.5) * 2.0**-52


class _History:
    """The distinct tokens of one sequence and how often each occurs in its output."""

    __slots__ = ("_place", "_size", "counts", "tokens")

    def __init__(self, prompt: list[int], output: list[int], vocab: int) -> None:
        seen = np.asarray(prompt + output, dtype=np.int64)
        # Ids beyond the logits (a padded embedding) cannot be sampled, so there is nothing to penalise.
        self.tokens: _Ints = np.unique(seen[seen < vocab])
        self._size = len(self.tokens)
        self._place = {token: i for i, token in enumerate(self.tokens.tolist())}
        self.counts = np.zeros(self._size, dtype=np.float32)
        for token in output:
            if token < vocab:
                self.counts[self._place[token]] += 1

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._size
            if place == len(self.tokens):
                self._grow()
            self._place[token] = place
            self.tokens[place] = token
            self._size += 1
        self.counts[place] += 1

    def _grow(self) -> None:
        more = max(16, len(self.tokens))
        self.tokens = np.concatenate([self.tokens, np.zeros(more, dtype=np.int64)])
        self.counts = np.concatenate([self.counts, np.zeros(more, dtype=np.float32)])

    def view(self) -> tuple[_Ints, npt.NDArray[np.float32]]:
        return self.tokens[: self._size], self.counts[: self._size]


class Sampler:
    """Chooses the next tokens of the sequences of one replica, which are known by their slots.

    It keeps what a sequence's choices depend on (parameters, number of tokens so far, history for penalties)
    and advances it with every sampled token. Plain greedy slots keep nothing. Not thread-safe.
    """

    def __init__(self, vocab: int, argmax: Callable[[Tensor], Tensor] | None = None) -> None:
        """`vocab` is the number of logits per row; `argmax` is that of the device's `Operators` (default: torch)."""
        assert vocab >= 1
        self._vocab = vocab
        self._argmax = argmax or _argmax
        self._rows: _Rows = np.zeros(64, dtype=_ROW)
        self._histories: dict[int, _History] = {}
        self._banned: dict[int, list[int]] = {}

    def open(self, slot: int, state: SamplingState | None) -> None:
        """Start a sequence in a closed slot, or continue it after `generated` tokens; None: plain greedy."""
        if slot >= len(self._rows):
            more = max(len(self._rows), slot + 1 - len(self._rows))
            self._rows = np.concatenate([self._rows, np.zeros(more, dtype=_ROW)])
        assert self._rows[slot]["state"] == _CLOSED, f"slot {slot} is open"
        if state is None:
            self._rows[slot]["state"] = _PLAIN
            return
        penalised = (
            state.repetition_penalty != 1.0 or state.presence_penalty != 0.0 or state.frequency_penalty != 0.0
        )
        self._rows[slot] = (
            _CUSTOM,
            penalised,
            state.temperature,
            state.top_p,
            state.top_k if 0 < state.top_k < self._vocab else 0,
            state.min_p,
            state.repetition_penalty,
            state.presence_penalty,
            state.frequency_penalty,
            state.noise_key,
            state.logprobs,
            state.min_tokens,
            state.generated,
        )
        if penalised:
            self._histories[slot] = _History(state.prompt, state.output, self._vocab)
        if state.generated < state.min_tokens:
            self._banned[slot] = [token for token in state.stop_token_ids if token < self._vocab]

    def close(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self._rows[slot]["state"] = _CLOSED
        self._histories.pop(slot, None)
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
        if not (rows["state"] == _CUSTOM).any():
            return SampleResult(self._argmax(logits), [])
        step = max(1, _CHUNK_ELEMENTS // self._vocab)
        parts = [slice(start, start + step) for start in range(0, len(slots), step)]
        tokens = torch.cat([self._choose(logits[part], slots[part], rows[part]) for part in parts])
        logprobs: list[ChosenToken | None] = []
        if (_asks(rows) >= 0).any():
            for part in parts:
                logprobs += _logprobs(logits[part], tokens[part], _asks(rows[part]))
        self._advance(index, slots, rows, tokens)
        return SampleResult(tokens, logprobs)

    def _choose(self, logits: Tensor, slots: list[int], rows: _Rows) -> Tensor:
        custom = rows["state"] == _CUSTOM
        penalised = np.flatnonzero(custom & rows["penalised"])
        waiting = np.flatnonzero(custom & (rows["generated"] < rows["min_tokens"]))
        if len(penalised) or len(waiting):
            logits = logits.to(torch.float32, copy=True)
            if len(penalised):
                histories = [self._histories[slots[row]] for row in penalised]
                _penalise(logits, penalised, rows[penalised], histories)
            if len(waiting):
                _ban(logits, waiting.tolist(), [self._banned[slots[row]] for row in waiting])
        tokens = self._argmax(logits)
        drawn = np.flatnonzero(custom & (rows["temperature"] >= _GREEDY_BELOW))
        if len(drawn):
            places = torch.from_numpy(drawn).to(logits.device)
            scores = logits if len(drawn) == len(rows) else logits[places]
            tokens[places] = _draw(scores, tokens[places], rows[drawn])
        return tokens

    def _advance(self, index: _Ints, slots: list[int], rows: _Rows, tokens: Tensor) -> None:
        self._rows["generated"][index] += 1
        penalised = np.flatnonzero((rows["state"] == _CUSTOM) & rows["penalised"])
        if len(penalised):
            chosen = tokens[torch.from_numpy(penalised).to(tokens.device)].tolist()
            for row, token in zip(penalised.tolist(), chosen, strict=True):
                self._histories[slots[row]].add(token)


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _asks(rows: _Rows) -> _Ints:
    """Most likely tokens wanted per row; -1 for rows that want no log-probabilities."""
    asks: _Ints = np.where(rows["state"] == _CUSTOM, rows["logprobs"], -1)
    return asks


def _penalise(logits: Tensor, places: _Ints, rows: _Rows, histories: list[_History]) -> None:
    """Penalise row `places[i]` of float32 `logits` in place, as `rows[i]` and `histories[i]` say."""
    views = [history.view() for history in histories]
    sizes = [len(tokens) for tokens, _ in views]

    def spread(values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.repeat(values, sizes)).to(logits.device)

    at = (spread(places), torch.from_numpy(np.concatenate([tokens for tokens, _ in views])).to(logits.device))
    counts = torch.from_numpy(np.concatenate([counts for _, counts in views])).to(logits.device)
    repetition = spread(rows["repetition"])
    scores = logits[at]
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores -= spread(rows["frequency"]) * counts
    scores -= spread(rows["presence"]) * (counts > 0)
    logits[at] = scores


def _ban(logits: Tensor, places: list[int], tokens: list[list[int]]) -> None:
    """Set the logits of `tokens[i]` to -inf, in place, in row `places[i]`."""
    rows = [row for row, banned in zip(places, tokens, strict=True) for _ in banned]
    columns = [token for banned in tokens for token in banned]
    logits[rows, columns] = -torch.inf


def _draw(scores: Tensor, best: Tensor, rows: _Rows) -> Tensor:
    """Sample one token per row of `scores` [m, vocab] whose argmax is `best` [m]; returns ids [m]."""
    parameters = _Parameters.gather(rows, scores, best)
    limited = (rows["top_k"] > 0) | (rows["top_p"] < 1.0)
    if not limited.any():
        return _draw_from_all(scores, parameters)
    if limited.all():
        return _draw_from_largest(scores, parameters)
    tokens = best.clone()
    for draw, chosen in ((_draw_from_all, ~limited), (_draw_from_largest, limited)):
        places = torch.from_numpy(np.flatnonzero(chosen)).to(best.device)
        tokens[places] = draw(scores[places], parameters.take(places))
    return tokens


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Per-row tensors [m] on the device of the logits; `largest` is a row's largest score, `best` its id."""

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    largest: Tensor
    best: Tensor

    @classmethod
    def gather(cls, rows: _Rows, scores: Tensor, best: Tensor) -> _Parameters:
        def tensor(values: npt.NDArray[np.generic]) -> Tensor:
            # A field of a record array has strides that torch may refuse.
            return torch.from_numpy(values.copy()).to(scores.device)

        return cls(
            temperature=tensor(rows["temperature"]),
            min_p=tensor(rows["min_p"]),
            top_k=tensor(rows["top_k"]),
            top_p=tensor(rows["top_p"]),
            uniform=tensor(uniforms(rows["noise_key"], rows["generated"])),
            largest=scores.gather(1, best[:, None])[:, 0].float(),
            best=best,
        )

    def take(self, places: Tensor) -> _Parameters:
        return _Parameters(
            temperature=self.temperature[places],
            min_p=self.min_p[places],
            top_k=self.top_k[places],
            top_p=self.top_p[places],
            uniform=self.uniform[places],
            largest=self.largest[places],
            best=self.best[places],
        )

    def weigh_(self, scores: Tensor) -> Tensor:
        """Turn float32 scores into weights, in place: probabilities over the largest one, 0 below min-p."""
        scores.sub_(self.largest[:, None]).div_(self.temperature[:, None]).exp_()
        if bool((self.min_p > 0).any()):
            _keep_(scores, scores >= self.min_p[:, None])
        return scores


def _keep_(weights: Tensor, kept: Tensor) -> Tensor:
    """Make the weights that are not `kept` 0, in place: a product, since filling takes four times as long."""
    return weights.mul_(kept)


def _draw_from_all(scores: Tensor, parameters: _Parameters) -> Tensor:
    """Draw from the whole vocabulary; returns token ids [m].

    The float32 sums of groups of weights locate the group, exact sums within that group the token: a fraction
    of the cost of a float64 cumulative sum over the vocabulary.
    """
    rows, vocab = scores.shape
    groups = -(-vocab // _SUM_WIDTH)
    padded = scores.new_zeros((rows, groups * _SUM_WIDTH), dtype=torch.float32)
    weights = padded[:, :vocab]
    weights.copy_(scores)
    parameters.weigh_(weights)
    grouped = padded.view(rows, groups, _SUM_WIDTH)
    sums = grouped.sum(dim=-1).double().cumsum(dim=-1)
    totals = sums[:, -1]
    target = parameters.uniform * totals
    group = _first_above(sums, target).clamp_(max=groups - 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = grouped[torch.arange(rows, device=scores.device), group].double().cumsum(dim=-1)
    # The group's float32 sum may exceed its exact one by a rounding error; stay below the end.
    rest = torch.minimum(target - before, inside[:, -1] * (1.0 - 2.0**-40))
    tokens = group * _SUM_WIDTH + _first_above(inside, rest)
    return torch.where(totals > 0, tokens, parameters.best)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Index [m] of the first of the rising `sums` [m, n] that exceeds `target` [m]: never one of weight 0."""
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0]


def _draw_from_largest(scores: Tensor, parameters: _Parameters) -> Tensor:
    """Draw from rows with a top-k or a top-p; returns token ids [m].

    Rows with a small top-k need their largest scores only, unless too many others equal the k-th.
    """
    scores, tokens = scores.float(), parameters.best.clone()
    few = (parameters.top_k > 0) & ((parameters.top_k + _TIE_ROOM) * 8 < scores.shape[1])
    if bool(few.any()):
        places = few.nonzero()[:, 0]
        chosen, enough = _draw_from_few(scores[places], parameters.take(places))
        tokens[places] = chosen
        few[places] = enough
    places = (~few).nonzero()[:, 0]
    if len(places):
        tokens[places] = _draw_from_sorted(scores[places], parameters.take(places))
    return tokens


def _draw_from_few(scores: Tensor, parameters: _Parameters) -> tuple[Tensor, Tensor]:
    """As `_draw_from_sorted`, from a few of the scores; also tells which rows these are enough for."""
    values, ids = scores.topk(int(parameters.top_k.max()) + _TIE_ROOM, dim=-1)
    last, equals, enough = _last_kept(values, parameters)
    ids, order = ids.sort(dim=-1)
    places = _draw_in_id_order(values.gather(1, order), last, equals, parameters)
    tokens = torch.where(places < 0, parameters.best, ids.gather(1, places.clamp(min=0)[:, None])[:, 0])
    return tokens, enough


def _draw_from_sorted(scores: Tensor, parameters: _Parameters) -> Tensor:
    """Draw from rows of any parameters; returns token ids [m].

    The scores alone are sorted, which numpy does ten times faster than torch sorts scores with their ids: they
    tell the last score that is kept, and how many of its equals are.
    """
    last, equals, _ = _last_kept(_falling(scores), parameters)
    tokens = _draw_in_id_order(scores, last, equals, parameters)
    return torch.where(tokens < 0, parameters.best, tokens)


def _falling(scores: Tensor) -> Tensor:
    """A sorted copy of float32 scores, the largest first."""
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _last_kept(values: Tensor, parameters: _Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """Of falling scores [m, n]: the last one left by min-p, top-k and top-p, and how many equal to it stay.

    The third result tells whether tokens were dropped before top-p, so that no more of them need be known.
    """
    weights = parameters.weigh_(values.clone())
    top_k = parameters.top_k
    if bool((top_k > 0).any()):
        kth = values.gather(1, (top_k - 1).clamp(min=0)[:, None])
        _keep_(weights, values >= torch.where(top_k[:, None] > 0, kth, -torch.inf))
    enough = weights[:, -1] == 0
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    share = torch.where(parameters.top_p < 1.0, parameters.top_p * sums[:, -1], torch.inf)
    _keep_(weights, sums.sub_(weights) < share[:, None])
    kept = (weights > 0).sum(dim=-1, keepdim=True)
    last = values.gather(1, (kept - 1).clamp(min=0))
    return last[:, 0], (kept - (values > last).sum(dim=-1, keepdim=True))[:, 0], enough


def _draw_in_id_order(scores: Tensor, last: Tensor, equals: Tensor, parameters: _Parameters) -> Tensor:
    """Draw among scores [m, n] that are in the order of their ids; returns columns [m], -1 if nothing is left.

    Kept are scores above `last` and the first `equals` that equal it. Whether the others are there or not makes no
    difference: they add 0 to the sums.
    """
    weights = parameters.weigh_(scores.clone())
    _keep_(weights, scores >= last[:, None])
    equal = torch.eq(
        scores, last[:, None], out=torch.empty_like(scores)
    )  # float32 counts exactly below 2**24
    if bool((equal.sum(dim=-1) > equals).any()):
        _keep_(weights, torch.logical_or(equal == 0, equal.cumsum(dim=-1) <= equals[:, None]))
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    totals = sums[:, -1]
    columns = _first_above(sums, parameters.uniform * totals).clamp_(max=scores.shape[1] - 1)
    return torch.where(totals > 0, columns, -1)


def _logprobs(logits: Tensor, tokens: Tensor, asks: _Ints) -> list[ChosenToken | None]:
    """Log-probabilities of the chosen `tokens` [m] under raw `logits` [m, vocab], where `asks` >= 0."""
    result: list[ChosenToken | None] = [None] * len(asks)
    asking = np.flatnonzero(asks >= 0)
    if not len(asking):
        return result
    places = torch.from_numpy(asking).to(logits.device)
    table = logits[places].float().log_softmax(dim=-1)
    chosen = table.gather(1, tokens[places][:, None])
    # Counting in float32 (exact below 2**24) takes a tenth of the time of summing booleans on CPUs.
    ahead = torch.gt(table, chosen, out=torch.empty_like(table)).sum(dim=-1)
    ranks = [int(count) + 1 for count in ahead.tolist()]
    most = min(int(asks.max()), table.shape[1])
    values, ids = _largest_with_ties(table, most) if most else (table[:, :0], table[:, :0].long())
    listed = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    for i, (row, logprob) in enumerate(zip(asking.tolist(), chosen[:, 0].tolist(), strict=True)):
        result[row] = ChosenToken(logprob=logprob, rank=ranks[i], top=listed[i][: asks[row]])
    return result


def _largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest scores of each row and their ids, falling; among equals, lower ids first."""
    vocab = scores.shape[1]
    if width * 8 >= vocab:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values[:, :width], ids[:, :width]
    values, ids = scores.topk(width, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _largest_with_ties(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `_largest`, also exact where several tokens equal the last one wanted."""
    width = min(count + _TIE_ROOM, table.shape[1])
    while True:
        values, ids = _largest(table, width)
        if width == table.shape[1] or not bool((values[:, -1] >= values[:, count - 1]).any()):
            return values[:, :count], ids[:, :count]
        width = min(width * 8, table.shape[1])
