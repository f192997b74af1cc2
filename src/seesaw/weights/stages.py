"""Dividing the layers of a model among pipeline stages. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil, inf, isfinite
from typing import NamedTuple

from seesaw.core.errors import LayoutError
from seesaw.core.model_spec import ModelSpec
from seesaw.models.parameters import layer_parameter_count


def head_weight_in_layers(spec: ModelSpec) -> float:
    """What the LM head weighs in layers, by parameters: the cost of a decode step, where each is read once."""
    return spec.vocab * spec.hidden / layer_parameter_count(spec)


def prefill_head_weight(spec: ModelSpec, last_layer: float | None = None) -> float:
    """What the end of the model weighs in prefill, in layers: less than nothing.

    The head runs on one token of each prompt only, and so does all of the last layer but its keys and values.
    `last_layer` is the parameters of that layer that a token passes, if it is not a dense one.
    """
    kept = 2 * spec.hidden * spec.kv_heads * spec.head_dim
    return kept / (last_layer or layer_parameter_count(spec)) - 1


@lru_cache(maxsize=1024)
def split_layers(weights: tuple[float, ...], pp: int, head_weight: float) -> tuple[range, ...]:
    """Contiguous layer ranges of `pp` stages, none empty, whose heaviest stage is as light as possible.

    `weights` are those of the layers; the last stage weighs `head_weight` last layers more, or less (above -1).
    Among equals the most even split is taken. Raises `LayoutError` if there are more stages than layers.
    """
    _check(len(weights), pp, head_weight)
    if len(set(weights)) == 1:
        return _split_equal(len(weights), pp, head_weight)
    before = [0.0, *accumulate(weights)]
    end = head_weight * weights[-1]
    heaviest = _best_cuts(before, pp, end, None)[0]
    cuts = _best_cuts(before, pp, end, heaviest * (1 + 1e-9))[1]
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), (*cuts, len(weights)), strict=True))


def _best_cuts(
    before: Sequence[float], pp: int, end: float, limit: float | None
) -> tuple[float, tuple[int, ...]]:
    """The split whose heaviest stage is lightest or, with a limit for every stage, whose squares add up to least:
    that weight or sum, and where stages 1, 2, … begin.

    `before[i]` is the weight of the layers in front of layer i; the last stage weighs `end` more.
    """
    layers = len(before) - 1
    burden = [0.0] + [inf] * layers  # of the stages so far, by where they stop
    chosen: list[list[int]] = []
    for stage in range(1, pp + 1):
        last, found, starts = stage == pp, [inf] * (layers + 1), [0] * (layers + 1)
        stops = range(layers, layers + 1) if last else range(stage, layers - pp + stage + 1)
        for stop in stops:
            for start in range(stage - 1, stop):
                weight = before[stop] - before[start] + (end if last else 0.0)
                if limit is None:
                    value = max(burden[start], weight)
                else:
                    value = burden[start] + weight * weight if weight <= limit else inf
                if value < found[stop]:
                    found[stop], starts[stop] = value, start
        burden = found
        chosen.append(starts)
    cuts, stop = [], layers
    for starts in reversed(chosen[1:]):
        stop = starts[stop]
        cuts.append(stop)
    return burden[layers], tuple(reversed(cuts))


class Division(NamedTuple):
    """Layer ranges of stages, and the FFN columns that each carries on (`weights.sharding.Sharding`)."""

    stages: tuple[range, ...]
    carried: tuple[int, ...]


_HALVINGS = 40


@lru_cache(maxsize=1024)
def divide_layers(
    weights: tuple[float, ...],
    ffns: tuple[float, ...],
    pp: int,
    head_weight: float,
    ffn: int,
    grain: int,
    last_most: float = inf,
) -> Division:
    """As `split_layers`, but stages may also begin within a layer, at every `grain` of the `ffn` columns of its FFN.

    `ffns[i]` is what of `weights[i]` is the FFN's, 0 for one that cannot be divided. The last layer stays whole, and
    every stage has the attention of a layer, and a `grain` at least of an FFN that it shares. The layers of the last
    stage, without `head_weight`, weigh `last_most` at most, which must leave room for one.
    """
    _check(len(weights), pp, head_weight)
    layers = _Layers(weights, ffns, head_weight, ffn, grain, last_most)
    low, high, best = layers.whole / pp, 2 * sum(weights) + layers.whole, None
    for _ in range(_HALVINGS):
        limit = (low + high) / 2
        found = layers.divided(pp, limit)
        best, low, high = (best, limit, high) if found is None else (found, low, limit)
    assert best is not None, "no stage weighs more than all layers"
    return best


class _Layers:
    """Layers by weight, where stages may begin, and which stages a limit for every one allows."""

    def __init__(
        self,
        weights: Sequence[float],
        ffns: Sequence[float],
        head_weight: float,
        ffn: int,
        grain: int,
        last_most: float,
    ) -> None:
        self._before = [0.0, *accumulate(weights)]
        self._column = [share / ffn for share in ffns]
        self._grain, self._most = grain, (ffn // grain - 1) * grain
        self.whole = self._before[-1] + head_weight * weights[-1]
        self._last_from = self._before[-1] - last_most
        """The last stage begins no further ahead."""

    def divided(self, pp: int, limit: float) -> Division | None:
        """Stages of no more than `limit`. For each first layer, it is best to begin as far on as possible."""
        layers = len(self._column)
        ways: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
        for left in range(pp - 1, 0, -1):
            reached: dict[int, tuple[int, int]] = {}
            for start, (carried, _) in ways[-1].items():
                end = self._place(start, carried) + limit
                for after in range(start + 1, layers - left + 1):
                    columns = self._carried(after, end)
                    if columns is None:
                        break
                    place = self._place(after, columns)
                    fits = self.whole - place <= limit * left * (1 + 1e-12)
                    fits = fits and (left > 1 or place >= self._last_from)
                    if fits and columns < reached.get(after, (self._most + 1, 0))[0]:
                        reached[after] = columns, start
            ways.append(reached)
        return _traced(ways, layers)

    def _place(self, start: int, carried: int) -> float:
        """The weight of all before a stage."""
        return self._before[start] - (carried * self._column[start - 1] if carried else 0.0)

    def _carried(self, start: int, end: float) -> int | None:
        """How many columns a stage that begins at `start` carries, if the one before ends at weight `end` or sooner;
        None if it cannot."""
        over, column = self._before[start] - end, self._column[start - 1]
        if over <= 0:
            return 0
        if not column:
            return None
        columns = ceil(over / column / self._grain) * self._grain
        return columns if columns <= self._most else None


def _traced(ways: Sequence[dict[int, tuple[int, int]]], layers: int) -> Division | None:
    """The division that ends at any start of the last stage; by stages, where they may begin: what they carry, and
    where the stage before begins then."""
    if not ways[-1]:
        return None
    start, stop = min(ways[-1]), layers
    stages, carried = list[range](), list[int]()
    for way in reversed(ways):
        stages.append(range(start, stop))
        carried.append(way[start][0])
        start, stop = way[start][1], start
    return Division(tuple(reversed(stages)), tuple(reversed(carried)))


def split_stages(spec: ModelSpec, pp: int, head_weight: float) -> tuple[range, ...]:
    """`split_layers` of a model whose layers are alike: the last stage weighs `head_weight` layers more, or less
    (above -1). Of the most even splits, the stages in front get the layers left over.

    Raises `LayoutError` if there are more stages than layers.
    """
    _check(spec.layers, pp, head_weight)
    return _split_equal(spec.layers, pp, head_weight)


def _check(layers: int, pp: int, head_weight: float) -> None:
    if pp > layers:
        raise LayoutError(f"P{pp}: {pp} pipeline stages need {pp} layers, the model has {layers}")
    if not (isfinite(head_weight) and head_weight > -1):
        raise LayoutError(f"head_weight={head_weight}: must be a finite number of layers above -1")


@lru_cache(maxsize=1024)
def _split_equal(layers: int, pp: int, head_weight: float) -> tuple[range, ...]:
    if pp == 1:
        return (range(layers),)
    candidates = (_sizes(layers, pp, last) for last in range(1, layers - pp + 2))
    sizes = min(candidates, key=lambda sizes: _burden(sizes, head_weight))
    ends = [sum(sizes[: stage + 1]) for stage in range(pp)]
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def _sizes(layers: int, pp: int, last: int) -> tuple[int, ...]:
    """Stage sizes with `last` layers on the last stage and the others spread evenly."""
    size, extra = divmod(layers - last, pp - 1)
    return (*(size + (stage < extra) for stage in range(pp - 1)), last)


def _burden(sizes: tuple[int, ...], head_weight: float) -> tuple[float, float, int]:
    weights = (*sizes[:-1], sizes[-1] + head_weight)
    return max(weights), sum(weight * weight for weight in weights), sizes[-1]
