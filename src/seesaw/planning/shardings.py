"""The shardings of a plan: which stages it has in each phase, and which rank takes which place. No torch."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Layout, Plan
from seesaw.planning.shapes import PlannedModel
from seesaw.weights.assignment import Units, assign_ranks
from seesaw.weights.footprint import Footprint
from seesaw.weights.sharding import Sharding, check_layout, make_sharding
from seesaw.weights.stages import divide_layers, prefill_head_weight, split_layers

Stages = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""Layers of each pipeline stage of prefill and decode, or None for those of `sharding_for`."""

Role = Literal["prefill", "decode", "both"]
"""The phases that a layout serves: both where the plan does not re-shard."""


@lru_cache(maxsize=16)
def footprint(model: PlannedModel) -> Footprint:
    """The bytes of the model's weights under any sharding."""
    return Footprint(model.spec, model.moe, matrix_bits=model.weight_bits, other_bits=model.other_bits)


@lru_cache(maxsize=4096)
def plan_shardings(
    model: PlannedModel, plan: Plan, stages: Stages | None = None
) -> tuple[Sharding, Sharding]:
    """Who holds what in each phase; ranks take the places that move least. `stages` goes before the balance of
    `sharding_for`. Raises `LayoutError`."""
    if not plan.reshards:
        if stages and stages[0] != stages[1]:
            raise LayoutError(
                f"plan {plan}: stages {stages[0]} and {stages[1]}: one layout for both phases has one division"
            )
        both = sharding_for(model, plan.decode, "both", stages[1] if stages else None)
        return both, both
    first = sharding_for(model, plan.prefill, "prefill", stages[0] if stages else None)
    second = sharding_for(model, plan.decode, "decode", stages[1] if stages else None)
    return first, assign_ranks(model.spec, first, second, model.moe, _units(model))


@lru_cache(maxsize=4096)
def sharding_for(
    model: PlannedModel, layout: Layout, role: Role, stages: tuple[int, ...] | None = None
) -> Sharding:
    """`layout` with ranks in order and, if `stages` does not say otherwise, its stages balanced for its role.

    Prefill goes by arithmetic: the LM head runs on one token of a prompt, and a token passes some experts. A step of
    decode reads all weights: the LM head weighs as much as the bits it is stored in, a sparse layer all its experts.
    For both, the phases are taken to be equally long. Where whole layers leave stages of prefill far from equal, the
    FFN of a layer is shared by two of them. Raises `LayoutError`.
    """
    check_layout(model.spec, layout, model.moe)
    if stages is not None:
        ranges = _ranges(layout, stages, model.spec.layers)
        return make_sharding(model.spec, layout, stages=ranges, moe=model.moe)
    whole = _whole(model, layout, role)
    if role == "prefill" and layout.pp > 1:
        return _evened(model, whole)
    return whole


def whole_stages(model: PlannedModel, layout: Layout, role: Role) -> tuple[int, ...]:
    """Numbers of layers of stages balanced for a role, without sharing FFNs. Raises `LayoutError`."""
    check_layout(model.spec, layout, model.moe)
    return tuple(map(len, _whole(model, layout, role).stages))


def carried_shares(model: PlannedModel, sharding: Sharding) -> tuple[float, ...]:
    """`Sharding.carried` as shares of an FFN."""
    return tuple(columns / model.spec.ffn for columns in sharding.carried)


_WORTH = 1.03
"""How much longer the longest stage must be than it needs to be for an FFN to be divided: at its border twice as much
is handed over, and small products are slower than large ones."""
_ROOM = 1.05
"""What the fullest rank may hold, by what it holds with whole layers: the last stage tends to take more, since its
last layer is nearly free in prefill, and has the LM head besides."""
_GRAIN = 128
"""FFN columns of a rank that stay together; a sixteenth where there are few."""


def _whole(model: PlannedModel, layout: Layout, role: Role) -> Sharding:
    """Stages of whole layers."""
    weights, end = _burden(model, role)
    stages = split_layers(weights, layout.pp, end)
    return make_sharding(model.spec, layout, stages=stages, moe=model.moe)


def _evened(model: PlannedModel, whole: Sharding) -> Sharding:
    """Stages of prefill that share FFNs, or `whole` ones if these are nearly as even."""
    spec, layout, sparse = model.spec, whole.layout, set(model.moe.sparse if model.moe else ())
    weights, end = _burden(model, "prefill")
    ffns = tuple(0.0 if layer in sparse else 3.0 * spec.hidden * spec.ffn for layer in range(spec.layers))
    grain = layout.tp * max(1, min(_GRAIN, spec.ffn // (16 * layout.tp)))
    last = max(_last_most(model, whole), 1.0) * weights[-1]
    stages, carried = divide_layers(weights, ffns, layout.pp, end, spec.ffn, grain, last)
    shared = make_sharding(spec, layout, stages=stages, carried=carried, moe=model.moe)
    return shared if _longest(model, whole) >= _WORTH * _longest(model, shared) else whole


def _last_most(model: PlannedModel, whole: Sharding) -> float:
    """How many last layers fit beside the LM head on a rank that holds `_ROOM` of what the fullest one does."""
    sizes = footprint(model)
    room = 8 * whole.layout.tp * _ROOM * max(sizes.held(whole))
    return (room - model.spec.vocab * model.spec.hidden * model.other_bits) / sizes.layer_bits()[-1]


def _longest(model: PlannedModel, sharding: Sharding) -> float:
    """What the heaviest stage weighs in prefill."""
    weights, end = _burden(model, "prefill")
    stages = [sum(weights[layer] for layer in stage) for stage in sharding.stages]
    stages[-1] += end * weights[-1]
    for stage, columns in enumerate(sharding.carried):
        stages[stage] += 3.0 * model.spec.hidden * columns
        stages[stage - 1] -= 3.0 * model.spec.hidden * columns
    return max(stages)


def _burden(model: PlannedModel, role: Role) -> tuple[tuple[float, ...], float]:
    """What the layers weigh in a role, and the end of the model in last layers."""
    if role == "prefill":
        weights = tuple(model.touched_in_layer(layer, 1) for layer in range(model.spec.layers))
        return weights, prefill_head_weight(model.spec, weights[-1])
    if role == "decode":
        bits = footprint(model).layer_bits()
        return bits, model.spec.vocab * model.spec.hidden * model.other_bits / bits[-1]
    phases = _burden(model, "prefill"), _burden(model, "decode")
    whole = [sum(weights) + end * weights[-1] for weights, end in phases]
    shares = [
        [weight / total for weight in weights] for (weights, _), total in zip(phases, whole, strict=True)
    ]
    both = tuple(map(sum, zip(*shares, strict=True)))
    ends = sum(end * share[-1] for (_, end), share in zip(phases, shares, strict=True))
    return both, ends / both[-1]


def _ranges(layout: Layout, stages: tuple[int, ...], layers: int) -> tuple[range, ...]:
    if len(stages) != layout.pp or min(stages) < 1 or sum(stages) != layers:
        raise LayoutError(
            f"layout {layout}: stages {stages} do not divide {layers} layers into {layout.pp} parts of at least one"
        )
    return tuple(range(stop - n, stop) for stop, n in zip(accumulate(stages), stages, strict=True))


def _units(model: PlannedModel) -> Units:
    """Matrices and everything else by the bits they are stored in."""
    ratio = Fraction(model.weight_bits / model.other_bits).limit_denominator(1024)
    return Units(ratio.numerator, ratio.denominator)
