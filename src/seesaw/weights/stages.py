"""Dividing the layers of a model among pipeline stages. No torch."""

from __future__ import annotations

from math import isfinite

from seesaw.core.errors import LayoutError
from seesaw.core.model_spec import ModelSpec
from seesaw.models.parameters import layer_parameter_count


def head_weight_in_layers(spec: ModelSpec) -> float:
    """What the LM head weighs in layers, by parameters: the cost of a decode step, where each is read once."""
    return spec.vocab * spec.hidden / layer_parameter_count(spec)


def prefill_head_weight(spec: ModelSpec) -> float:
    """What the end of the model weighs in prefill, in layers: less than nothing.

    The head runs on one token of each prompt only, and so does all of the last layer but its keys and values.
    """
    kept = 2 * spec.hidden * spec.kv_heads * spec.head_dim
    return kept / layer_parameter_count(spec) - 1


def split_stages(spec: ModelSpec, pp: int, head_weight: float) -> tuple[range, ...]:
    """Contiguous layer ranges of `pp` stages, none empty, whose heaviest stage is as light as possible.

    A layer weighs 1; the last stage weighs `head_weight` layers more, or less (above -1). Among equals the most
    even split is taken, and the stages in front get the layers left over.
    Raises `LayoutError` if there are more stages than layers.
    """
    if pp > spec.layers:
        raise LayoutError(f"P{pp}: {pp} pipeline stages need {pp} layers, the model has {spec.layers}")
    if not (isfinite(head_weight) and head_weight > -1):
        raise LayoutError(f"head_weight={head_weight}: must be a finite number of layers above -1")
    if pp == 1:
        return (range(spec.layers),)
    candidates = (_sizes(spec.layers, pp, last) for last in range(1, spec.layers - pp + 2))
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
