"""Dividing the layers of a model among pipeline stages. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf, isfinite

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
