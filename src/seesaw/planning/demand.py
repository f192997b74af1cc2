"""What a plan asks of each rank: weights, activations, logits and KV, before any budget is divided.

The engine's own intervals say so. Of what the engine does not run yet, quantised weights count in the bits they are
stored in, and a rank has its columns of every expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from seesaw.core.layout import Layout
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.shardings import Stages, footprint, sharding_for
from seesaw.weights.changes import Mode
from seesaw.weights.sharding import Sharding, Share, shares

MODES: tuple[Mode, ...] = ("resident", "delta", "reload")


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one rank. Pairs are (prefill, decode)."""

    peaks: tuple[int, int, int]
    """Most bytes of weights that it holds at any time, transitions included, by `MODES`."""
    width: tuple[int, int]
    """Elements of activations that a token takes at its widest."""
    logits: tuple[int, int]
    """float32 numbers that a sampled sequence takes."""
    kv: tuple[int, int]
    """Elements of K and V of a token."""
    heads: tuple[int, int]
    """Heads of queries."""
    layers: tuple[int, int]


@lru_cache(maxsize=1024)
def demands(model: PlannedModel, shardings: tuple[Sharding, Sharding]) -> tuple[Demand, ...]:
    """Of every rank. `shardings` are (prefill, decode), twice the same where nothing is re-sharded."""
    first, second = shardings
    weights = footprint(model)
    if first == second:
        peaks = [(held, held, held) for held in weights.held(first)]
    else:
        ways = zip(weights.changes(first, second), weights.changes(second, first), strict=True)
        peaks = [
            (max(t.resident, b.resident), max(t.delta, b.delta), max(t.before, t.after)) for t, b in ways
        ]
    ranks = zip(*(_by_rank(model, sharding) for sharding in shardings), strict=True)
    return tuple(
        Demand(peak, *zip(prefill, decode, strict=True))
        for peak, (prefill, decode) in zip(peaks, ranks, strict=True)
    )


@lru_cache(maxsize=8192)
def distinct_demands(model: PlannedModel, shardings: tuple[Sharding, Sharding]) -> tuple[Demand, ...]:
    """Without those of ranks that are like others."""
    return tuple(dict.fromkeys(demands(model, shardings)))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Demands between which those of all ranks lie, whichever rank takes which place."""

    least: Demand
    most: Demand


@lru_cache(maxsize=4096)
def bounds(model: PlannedModel, prefill: Layout, decode: Layout, stages: Stages | None = None) -> Bounds:
    """For two layouts with different degrees of tensor parallelism, at a fraction of the cost of `demands`.

    No tensor is the same under both but those that are not divided.
    """
    assert prefill.tp != decode.tp, "with the same degree, whole layers stay as they are"
    first = sharding_for(model, prefill, "prefill", stages[0] if stages else None)
    second = sharding_for(model, decode, "decode", stages[1] if stages else None)
    old, new, weights = _extremes(model, first), _extremes(model, second), footprint(model)
    fewer, more = sorted((first, second), key=lambda sharding: sharding.layout.tp)
    degrees = fewer.layout.tp, more.layout.tp
    larger = max(old.most[0], new.most[0])
    both = max(old.most[0] + new.least[0], old.least[0] + new.most[0]) - weights.undivided(*degrees)
    whole = min(map(len, fewer.stages)) - any(fewer.carried)
    excess = weights.excess(*degrees, whole)
    most = old.most[0] + new.most[0], larger + excess, larger
    return Bounds(
        least=Demand((both, larger, larger), *zip(old.least[1:], new.least[1:], strict=True)),
        most=Demand(most, *zip(old.most[1:], new.most[1:], strict=True)),
    )


_Figures = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Extremes:
    """Least and most of any rank: bytes of weights, width, logits, KV, heads, layers."""

    least: _Figures
    most: _Figures


@lru_cache(maxsize=1024)
def _extremes(model: PlannedModel, sharding: Sharding) -> _Extremes:
    figures = [
        footprint(model).held(sharding),
        *zip(*_by_rank(model, sharding), strict=True),
    ]
    held, width, logits, kv, heads, layers = figures
    return _Extremes(
        (min(held), min(width), min(logits), min(kv), min(heads), min(layers)),
        (max(held), max(width), max(logits), max(kv), max(heads), max(layers)),
    )


def _by_rank(model: PlannedModel, sharding: Sharding) -> list[tuple[int, int, int, int, int]]:
    """Width, logits, KV, heads and layers of each rank, in the order of their numbers."""
    layout, head_dim = sharding.layout, model.spec.head_dim
    places = [
        (
            _width(model, share, layers),
            _logits(model, share, layers, samples=index == 0),
            2 * len(layers) * len(share.kv_heads) * head_dim,
            len(share.q_heads),
            len(layers),
        )
        for layers in sharding.stages
        for index, share in enumerate(shares(model.spec, layout.tp, model.moe))
    ]
    return [place for _, place in sorted(zip(sharding.ranks, places * layout.dp, strict=True))]


def _width(model: PlannedModel, share: Share, layers: range) -> int:
    """Of its hidden state and, at their widest, of attention or the FFN.

    In a sparse layer that is, for each expert that a token passes, a copy of its hidden state beside gate, up and
    their product.
    """
    spec, moe = model.spec, model.moe
    heads = (len(share.q_heads) + 2 * len(share.kv_heads)) * spec.head_dim
    widest = [3 * heads]
    sparse = sum(layer in layers for layer in moe.sparse) if moe else 0
    if sparse < len(layers):
        widest.append(3 * len(share.ffn))
    if moe and sparse:
        each = 3 * len(share.expert_ffn) + spec.hidden
        widest.append(moe.experts_per_token * each + 3 * len(share.shared_ffn))
    return 4 * spec.hidden + max(widest)


def _logits(model: PlannedModel, share: Share, layers: range, *, samples: bool) -> int:
    """Of a rank with the LM head: its own rows and, on the one that samples, all of them twice."""
    if layers.stop < model.spec.layers:
        return 0
    return len(share.vocab) + (2 * model.spec.vocab if samples else 0)
