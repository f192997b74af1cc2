"""Drawing tokens by chance: temperature, min-p, top-k, top-p, and inversion of the cumulative distribution.

What may be drawn from a row, and with which weight, is said once: by `_last_kept` for rows with a top-k or a top-p,
and by `_draw_in_id_order` and `_draw_from_all`. Which scores these look at goes by what the host knows. Where it may
ask the device (on a CPU, where asking is free) it also leaves out work that this batch turns out not to need.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seesaw.execution.sampling.rows import Flags, Rows, Uploads, uniforms

SUM_WIDTH = 256
"""Weights are summed in groups of this many before the exact cumulative sum over groups."""
TIE_ROOM = 64
"""Places beyond the largest top-k that are looked at for tokens equal to the k-th."""
_ALL, _FEW, _SORTED = range(3)
"""Ways to draw: from all tokens; by the largest scores, for a small top-k; by all scores in order."""


class Draws:
    """The rows of one call that take a token by chance; `parts` are those of the batch that are worked on at once."""

    def __init__(
        self, rows: Rows, drawn: Flags, parts: list[slice], vocab: int, uploads: Uploads, *, ask: bool
    ) -> None:
        """`ask` says whether it may ask the device for what it has computed."""
        self._ask = ask
        self._groups: list[list[_Group]] = []
        places, start = [], 0
        ways = np.where(drawn, _ways(rows, vocab), -1)
        for part in parts:
            groups = []
            for way in range(3):
                found = np.flatnonzero(ways[part] == way)
                if len(found):
                    stop, of_group = start + len(found), rows[part][found]
                    whole = len(found) == len(ways[part])
                    top_k = int(of_group["top_k"].max())
                    groups.append(_Group(way, start, stop, whole, bool((of_group["min_p"] > 0).any()), top_k))
                    places.append(found + part.start)
                    start = stop
            self._groups.append(groups)
        order = np.concatenate(places)
        ordered = rows[order]
        step = parts[0].stop - parts[0].start
        self._places = uploads.add(order % step)
        # a field of a record array has strides that torch may refuse
        self._temperature = uploads.add(ordered["temperature"].copy())
        self._min_p = uploads.add(ordered["min_p"].copy())
        self._top_k = uploads.add(ordered["top_k"].copy())
        self._top_p = uploads.add(ordered["top_p"].copy())
        self._uniform = uploads.add(uniforms(ordered["noise_key"], ordered["generated"]))

    def draw_(self, number: int, scores: Tensor, tokens: Tensor) -> Tensor:
        """Put what is drawn from part `number` into `tokens` [m]: the argmax of its `scores` [m, vocab] so far."""
        for group in self._groups[number]:
            if group.whole:
                return self._drawn(group, scores, tokens)
            places = self._places()[group.start : group.stop]
            chosen = self._drawn(group, scores.index_select(0, places), tokens.index_select(0, places))
            tokens.index_copy_(0, places, chosen)
        return tokens

    def _drawn(self, group: _Group, scores: Tensor, best: Tensor) -> Tensor:
        rows = slice(group.start, group.stop)
        parameters = Parameters(
            temperature=self._temperature()[rows],
            min_p=self._min_p()[rows] if group.min_p else None,
            top_k=self._top_k()[rows],
            top_p=self._top_p()[rows],
            uniform=self._uniform()[rows],
            largest=scores.gather(1, best[:, None])[:, 0].float(),
            best=best,
            most=group.top_k,
            ask=self._ask,
        )
        if group.way == _ALL:
            return _draw_from_all(scores, parameters)
        if group.way == _SORTED:
            return _draw_from_sorted(scores.float(), parameters)
        return _draw_by_largest(scores.float(), parameters)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of a part that are drawn in one way: `start` to `stop` of all that are drawn in the call."""

    way: int
    start: int
    stop: int
    whole: bool
    """Whether they are the whole part."""
    min_p: bool
    """Whether any of them has a min-p."""
    top_k: int
    """The largest one of theirs."""


def _ways(rows: Rows, vocab: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    top_k = rows["top_k"]
    few = (top_k > 0) & ((top_k + TIE_ROOM) * 8 < vocab)
    limited = (top_k > 0) | (rows["top_p"] < 1.0)
    return np.where(few, _FEW, np.where(limited, _SORTED, _ALL))


@dataclass(frozen=True, slots=True)
class Parameters:
    """Per-row tensors [m] on the device of the logits; `largest` is a row's largest score, `best` its id."""

    temperature: Tensor
    min_p: Tensor | None
    """None if no row has one."""
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    largest: Tensor
    best: Tensor
    most: int
    """The largest top-k."""
    ask: bool
    """Whether the device may be asked for what it has computed."""

    def take(self, places: Tensor) -> Parameters:
        """Those of some rows."""
        return Parameters(
            temperature=self.temperature[places],
            min_p=None if self.min_p is None else self.min_p[places],
            top_k=self.top_k[places],
            top_p=self.top_p[places],
            uniform=self.uniform[places],
            largest=self.largest[places],
            best=self.best[places],
            most=self.most,
            ask=self.ask,
        )

    def weigh_(self, scores: Tensor) -> Tensor:
        """Turn float32 scores into weights, in place: probabilities over the largest one, 0 below min-p."""
        scores.sub_(self.largest[:, None]).div_(self.temperature[:, None]).exp_()
        if self.min_p is not None:
            _keep_(scores, scores >= self.min_p[:, None])
        return scores


def _keep_(weights: Tensor, kept: Tensor) -> Tensor:
    """Make the weights that are not `kept` 0, in place: a product, since filling takes four times as long."""
    return weights.mul_(kept)


def _draw_from_all(scores: Tensor, parameters: Parameters) -> Tensor:
    """Draw from the whole vocabulary; returns token ids [m].

    The float32 sums of groups of weights locate the group, exact sums within that group the token: a fraction
    of the cost of a float64 cumulative sum over the vocabulary.
    """
    rows, vocab = scores.shape
    groups = -(-vocab // SUM_WIDTH)
    padded = scores.new_zeros((rows, groups * SUM_WIDTH), dtype=torch.float32)
    weights = padded[:, :vocab]
    weights.copy_(scores)
    parameters.weigh_(weights)
    grouped = padded.view(rows, groups, SUM_WIDTH)
    sums = grouped.sum(dim=-1).double().cumsum(dim=-1)
    totals = sums[:, -1]
    target = parameters.uniform * totals
    group = _first_above(sums, target).clamp_(max=groups - 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = grouped[torch.arange(rows, device=scores.device), group].double().cumsum(dim=-1)
    # The group's float32 sum may exceed its exact one by a rounding error; stay below the end.
    rest = torch.minimum(target - before, inside[:, -1] * (1.0 - 2.0**-40))
    tokens = group * SUM_WIDTH + _first_above(inside, rest)
    return torch.where(totals > 0, tokens, parameters.best)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Index [m] of the first of the rising `sums` [m, n] that exceeds `target` [m]: never one of weight 0."""
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0]


def _draw_by_largest(scores: Tensor, parameters: Parameters) -> Tensor:
    """As `_draw_from_sorted`, for rows with a small top-k: the scores at the border are among the largest few."""
    width = parameters.most + TIE_ROOM
    if not parameters.ask:
        values = scores.topk(width, dim=-1).values
        last, equals, _ = _last_kept(values, parameters, _left_out(scores, values, parameters))
        return _chosen(_draw_in_id_order(scores, last, equals, parameters), parameters)
    values, ids = scores.topk(width, dim=-1)
    last, equals, enough = _last_kept(values, parameters)
    ids, order = ids.sort(dim=-1)
    columns = _draw_in_id_order(values.gather(1, order), last, equals, parameters)
    tokens = torch.where(columns < 0, parameters.best, ids.gather(1, columns.clamp(min=0)[:, None])[:, 0])
    places = (~enough).nonzero()[:, 0]
    if len(places):  # of these, too many others equal the k-th
        tokens[places] = _draw_from_sorted(scores[places], parameters.take(places))
    return tokens


def _left_out(scores: Tensor, values: Tensor, parameters: Parameters) -> Tensor:
    """How many of `scores` [m, vocab] equal the k-th largest, beyond those among the largest `values` [m, n]."""
    kth = values.gather(1, (parameters.top_k - 1)[:, None])
    return (scores == kth).sum(dim=-1, keepdim=True) - (values == kth).sum(dim=-1, keepdim=True)


def _draw_from_sorted(scores: Tensor, parameters: Parameters) -> Tensor:
    """Draw from rows of any parameters; returns token ids [m].

    The scores alone are sorted, which numpy does ten times faster than torch sorts scores with their ids: they
    tell the last score that is kept, and how many of its equals are.
    """
    last, equals, _ = _last_kept(_falling(scores), parameters)
    return _chosen(_draw_in_id_order(scores, last, equals, parameters), parameters)


def _chosen(columns: Tensor, parameters: Parameters) -> Tensor:
    return torch.where(columns < 0, parameters.best, columns)


def _falling(scores: Tensor) -> Tensor:
    """A sorted copy of float32 scores, the largest first."""
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _last_kept(
    values: Tensor, parameters: Parameters, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of falling scores [m, n]: the last one left by min-p, top-k and top-p, and how many equal to it stay.

    `left_out` [m, 1] says how many more there are that equal the k-th, if all rows have a top-k. The third result
    tells whether tokens were dropped before top-p, so that no more of them need be known.
    """
    weights = parameters.weigh_(values.clone())
    top_k = parameters.top_k
    before_kth = (top_k - 1).clamp(min=0)[:, None]
    if parameters.most:
        kth = values.gather(1, before_kth)
        _keep_(weights, values >= torch.where(top_k[:, None] > 0, kth, -torch.inf))
    enough = weights[:, -1] == 0
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total, more = sums[:, -1:], None
    if left_out is not None:
        weight = weights.gather(1, before_kth).double()
        more = (total, weight, left_out)
        total = total + weight * left_out
    share = torch.where(parameters.top_p[:, None] < 1.0, parameters.top_p[:, None] * total, torch.inf)
    _keep_(weights, sums - weights < share)
    kept = (weights > 0).sum(dim=-1, keepdim=True)
    last = values.gather(1, (kept - 1).clamp(min=0))
    equals = kept - (values > last).sum(dim=-1, keepdim=True)
    if more is not None:
        equals = equals + _more_kept(share, *more)
    return last[:, 0], equals[:, 0], enough


def _more_kept(share: Tensor, total: Tensor, weight: Tensor, left_out: Tensor) -> Tensor:
    """Of `left_out` tokens of one `weight` behind those that weigh `total`, how many begin below `share`. All [m, 1].

    The first begins at `total`. Only if all before it are kept is any, and then the last one kept is the k-th.
    """
    below = torch.where(weight > 0, ((share - total) / weight).ceil(), 0.0)
    return torch.minimum(below.clamp(min=0.0), left_out.double()).long()


def _draw_in_id_order(scores: Tensor, last: Tensor, equals: Tensor, parameters: Parameters) -> Tensor:
    """Draw among scores [m, n] that are in the order of their ids; returns columns [m], -1 if nothing is left.

    Kept are scores above `last` and the first `equals` that equal it. Whether the others are there or not makes no
    difference: they add 0 to the sums.
    """
    weights = parameters.weigh_(scores.clone())
    _keep_(weights, scores >= last[:, None])
    # float32 counts exactly below 2**24
    equal = torch.eq(scores, last[:, None], out=torch.empty_like(scores))
    if not parameters.ask or bool((equal.sum(dim=-1) > equals).any()):
        _keep_(weights, torch.logical_or(equal == 0, equal.cumsum(dim=-1) <= equals[:, None]))
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    totals = sums[:, -1]
    columns = _first_above(sums, parameters.uniform * totals).clamp_(max=scores.shape[1] - 1)
    return torch.where(totals > 0, columns, -1)
