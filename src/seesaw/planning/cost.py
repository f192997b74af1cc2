"""What a Forward costs on each pipeline stage of a layout, from a model's shape and a `HardwareSpec`.

An operator takes `max(flops / (peak * e(rows)), bytes / bandwidth) + overhead`: weights stream from memory, or
arithmetic bounds it. An all-reduce and a hand-over between stages follow the measured curves of their links; where
sums travel while they are computed, an all-reduce is what is left when its product is done. A `Cost` keeps the parts
apart, so that a prediction can say what it is made of.

The shards are the engine's own: a rank's share of heads, FFN columns and vocabulary is that of the first
tensor-parallel rank, which holds the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec, TypeCurves
from seesaw.core.layout import Layout
from seesaw.core.partial_sums import left_of_sum, part_bounds
from seesaw.planning.shapes import PlannedModel

_SMALL_OPERATORS = 5
"""Of a layer, beside products and attention: two norms with their residuals, rotation, SwiGLU, writing KV."""
_SMALL_OPERATORS_OF_KV = 3
"""Of them, those that a last layer without sampled rows still runs: a norm, rotation, writing KV."""


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Seconds by cause."""

    weights: float = 0.0
    """Products that memory bounds."""
    arithmetic: float = 0.0
    """Products that arithmetic bounds."""
    attention: float = 0.0
    """With what ranks of a group wait for each other behind it."""
    activations: float = 0.0
    """Norms, rotation and the like: reading and writing activations."""
    all_reduce: float = 0.0
    """And waiting for the slowest rank of the group, behind all but attention."""
    overhead: float = 0.0
    """Launches, and what a step costs beside its operators."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.with_attention(0.0)

    def with_attention(self, seconds: float) -> float:
        """All of it and so many seconds of attention."""
        return (
            self.weights
            + self.arithmetic
            + (self.attention + seconds)
            + self.activations
            + self.all_reduce
            + self.overhead
        )

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights,
            self.arithmetic + other.arithmetic,
            self.attention + other.attention,
            self.activations + other.activations,
            self.all_reduce + other.all_reduce,
            self.overhead + other.overhead,
        )

    def times(self, factor: float) -> Cost:
        """So many of it."""
        return Cost(
            factor * self.weights,
            factor * self.arithmetic,
            factor * self.attention,
            factor * self.activations,
            factor * self.all_reduce,
            factor * self.overhead,
        )


class Work(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a Forward has to do, as far as its cost depends on it."""

    tokens: int
    """Fed, over all sequences."""
    sampled: int
    """Sequences of which the next token is sampled."""
    pairs: float = 0.0
    """(query, key) pairs of the sequences that feed more than one token."""
    keys: float = 0.0
    """Keys read by the sequences that feed one token."""


class _Product(msgspec.Struct, frozen=True, gc=False):
    """A weight of `depth` x `columns` elements on one rank."""

    depth: int
    columns: int
    bits: float


@dataclass(slots=True)
class LayoutCost:
    """Seconds of Forwards on the stages of one replica. `stages` are numbers of layers."""

    model: PlannedModel
    hardware: HardwareSpec
    layout: Layout
    stages: Sequence[int]
    dtype: str = "bfloat16"
    """Type that products are computed in; activations have it too."""
    carried: Sequence[float] = ()
    """Of each stage, which share of the FFN before its first layer it computes instead of the stage before; empty
    where no layer is divided."""
    _rows: dict[tuple[int, int, int], Cost] = field(default_factory=dict)
    """What depends on rows alone, by stage, tokens and sampled sequences: steps repeat themselves."""
    _curves: TypeCurves = field(init=False)
    _peak: float = field(init=False)
    """Flops per second at most."""
    _full_rate: float = field(init=False)
    """Flops per second of products with as many rows as it takes."""
    _of_token: float = field(init=False)
    """Of one layer's attention on a rank: seconds for each new token, whatever its context,"""
    _of_pair: float = field(init=False)
    """flops for each pair of query and key,"""
    _of_key: float = field(init=False)
    """and elements of K and V for each key."""

    def __post_init__(self) -> None:
        if self.dtype not in self.hardware.flops:
            raise ConfigError(
                f"the hardware {self.hardware.name} has no figures for {self.dtype}, only for "
                f"{', '.join(self.hardware.flops)}; if it is this machine, run `seesaw profile --dtype {self.dtype}`"
            )
        spec, curves, tp = self.model.spec, self.hardware.curves(self.dtype), self.layout.tp
        heads, kv_heads = -(-spec.heads // tp), -(-spec.kv_heads // tp)
        self._curves, self._peak = curves, self.hardware.flops[self.dtype]
        self._full_rate = self._peak * curves.product.values[-1]
        self._of_token = (heads * curves.token_of_query + kv_heads * curves.token_of_kv) * spec.head_dim
        self._of_pair = 4.0 * heads * spec.head_dim
        self._of_key = 2.0 * kv_heads * spec.head_dim

    def stage(self, index: int, work: Work) -> Cost:
        """One Forward on stage `index`."""
        attention = self.attention_of(index, self.attention(work))
        return self.by_rows(index, work.tokens, work.sampled) + Cost(attention=attention)

    def by_rows(self, index: int, tokens: int, sampled: int) -> Cost:
        """`stage` but its attention: what depends on the number of tokens and of sampled sequences alone."""
        key = index, tokens, sampled
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = self._by_rows(*key)
        return found

    def attention(self, work: Work) -> tuple[float, float]:
        """Seconds of attention in a layer, and in the last layer of the model."""
        seconds = self._attention(work.tokens, work.pairs, work.keys)
        if work.sampled == work.tokens:
            return seconds, seconds
        if not work.sampled:
            return seconds, 0.0
        # Only tokens that are sampled ask, so prompts read keys as well. One is taken to have been fed whole; what
        # earlier chunks left of it would be read besides.
        return seconds, self._attention(work.tokens, 0.0, work.keys + work.tokens)

    def attention_of(self, index: int, seconds: tuple[float, float]) -> float:
        """Of stage `index`, by the seconds of a layer and of the last one."""
        layer, last = seconds
        if layer == last or not self._is_last(index):
            return self.stages[index] * layer
        return (self.stages[index] - 1) * layer + last

    def hand_over(self, tokens: int) -> float:
        """Seconds from one stage's end of a Forward until the next one has its activations: the mean over all borders
        of stages, as twice as much passes one within a layer."""
        size = tokens * self.model.spec.hidden * self._activation_bytes
        once, divided = self.hardware.send(size), sum(share > 0 for share in self.carried)
        if not divided:
            return once
        return once + (self.hardware.send(2 * size) - once) * divided / (len(self.stages) - 1)

    def kind(self, index: int) -> tuple[int, bool, bool, float, float]:
        """Of stage `index`; stages of one kind cost the same."""
        summed, last = self.layout.tp > 1, self._is_last(index)
        return self.stages[index], summed and index == 0, last, self._carried(index), self._carried(index + 1)

    # ---- parts --------------------------------------------------------------------------------------------

    @property
    def _head_bits(self) -> float:
        """Quantised checkpoints leave the LM head at 16 bits."""
        return max(self.model.weight_bits, 16.0)

    @property
    def _activation_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def _carried(self, index: int) -> float:
        return self.carried[index] if index < len(self.carried) else 0.0

    def _is_last(self, index: int) -> bool:
        return index == self.layout.pp - 1

    def _by_rows(self, index: int, tokens: int, sampled: int) -> Cost:
        spec, tp, last = self.model.spec, self.layout.tp, self._is_last(index)
        layer = self._layer(tokens, tokens)
        total = layer.times(self.stages[index] - last)
        if last:  # the last layer computes keys and values for all tokens, the rest for the sampled ones
            total += self._layer(tokens, sampled)
        if last and sampled:
            total += self._product(_Product(spec.hidden, -(-spec.vocab // tp), self._head_bits), sampled)
        carried, left = self._carried(index), self._carried(index + 1)
        if carried or left:
            total += self._feed_forward_block(tokens).times(carried - left)
        waiting = self._waiting(total.seconds / (2 * self.stages[index])) * total.seconds
        sums = (self.stages[index] - last + 0.5 * (carried > 0)) * self._sums(tokens)
        if index == 0:
            sums += self._all_reduce(tokens)  # of the embedding
        if last:
            sums += self._sums(sampled)
        total += Cost(all_reduce=sums + waiting)
        overhead = self.hardware.step_overhead + self.stages[index] * self.hardware.layer_overhead
        return total + Cost(overhead=overhead)

    def _layer(self, tokens: int, rows: int) -> Cost:
        """A layer but its attention: `tokens` rows of K and V, `rows` of everything else."""
        spec, tp, bits = self.model.spec, self.layout.tp, self.model.weight_bits
        heads, kv = -(-spec.heads // tp) * spec.head_dim, -(-spec.kv_heads // tp) * spec.head_dim
        if not rows:
            overhead = _SMALL_OPERATORS_OF_KV * self.hardware.operator_overhead
            return self._product(_Product(spec.hidden, 2 * kv, bits), tokens) + Cost(overhead=overhead)
        if rows == tokens:
            total = self._product(_Product(spec.hidden, heads + 2 * kv, bits), tokens)
        else:
            total = self._product(_Product(spec.hidden, 2 * kv, bits), tokens)
            total += self._product(_Product(spec.hidden, heads, bits), rows)
        total += self._product(_Product(heads, spec.hidden, bits), rows)
        overhead = _SMALL_OPERATORS * self.hardware.operator_overhead
        total += self._feed_forward_block(rows) + Cost(overhead=overhead)
        return total + self._moved(rows * (8 * spec.hidden + 3 * (heads + 2 * kv)))

    def _feed_forward_block(self, rows: int) -> Cost:
        """A layer's FFN with what is read and written between its products."""
        width = -(-self.model.spec.ffn // self.layout.tp)
        return self._feed_forward(rows) + self._moved(rows * 3 * width)

    def _moved(self, elements: int) -> Cost:
        bandwidth = self.hardware.activation_bandwidth or self.hardware.bandwidth
        return Cost(activations=elements * self._activation_bytes / bandwidth)

    def _feed_forward(self, rows: int) -> Cost:
        spec, moe, tp = self.model.spec, self.model.moe, self.layout.tp
        dense = self._two_products(-(-spec.ffn // tp), rows, 1.0)
        if moe is None:
            return dense
        share = moe.sparse_layers / spec.layers
        touched = moe.experts * (1.0 - (1.0 - moe.experts_per_token / moe.experts) ** rows)
        sparse = self._two_products(-(-moe.expert_ffn // tp), rows, touched, moe.experts_per_token)
        sparse += self._product(_Product(spec.hidden, moe.experts, self._head_bits), rows)
        if moe.shared_ffn:
            sparse += self._two_products(-(-moe.shared_ffn // tp), rows, 1.0)
        return sparse.times(share) + dense.times(1.0 - share)

    def _two_products(self, width: int, rows: int, read: float, per_token: int = 1) -> Cost:
        """Gate and up in one, and down: `read` copies are read, each token passes `per_token` of them."""
        hidden, bits = self.model.spec.hidden, self.model.weight_bits
        return self._product(_Product(hidden, 2 * width, bits), rows, read, per_token) + self._product(
            _Product(width, hidden, bits), rows, read, per_token
        )

    def _product(self, weight: _Product, rows: int, read: float = 1.0, per_token: int = 1) -> Cost:
        hardware, elements = self.hardware, weight.depth * weight.columns
        each = rows * per_token / read  # rows that one copy of the weight meets
        flops = 2.0 * rows * per_token * elements
        arithmetic = flops / (self._peak * self._curves.product(each))
        streaming = read * elements * weight.bits / 8 / hardware.bandwidth
        if streaming >= flops / self._full_rate:  # a measured curve falls short of it where memory bounds
            return Cost(weights=max(streaming, arithmetic), overhead=hardware.operator_overhead)
        return Cost(arithmetic=arithmetic, overhead=hardware.operator_overhead)

    def _attention(self, tokens: int, pairs: float, keys: float) -> float:
        """One layer's."""
        hardware, curves = self.hardware, self._curves
        seconds = hardware.operator_overhead + tokens * self._of_token
        if pairs:
            flops = self._of_pair * pairs
            seconds += flops / (self._peak * curves.prefill_attention(flops))
        if keys:
            moved = self._of_key * keys * self.model.kv_bits / 8
            seconds += moved / (hardware.bandwidth * curves.decode_attention(moved))
        return seconds * (1 + self._waiting(seconds))

    def _waiting(self, seconds: float) -> float:
        """The share of their time for which ranks that meet every so many seconds wait for the slowest of them."""
        shares = self.hardware.waiting.get(self.layout.tp)
        return 0.0 if shares is None else shares(seconds)

    def _sums(self, rows: int) -> float:
        """Of a layer's two products that are summed over the ranks: what the sums take beyond the products."""
        spec, tp, bits = self.model.spec, self.layout.tp, self.model.weight_bits
        whole = self._all_reduce(rows)
        if not whole or not self.hardware.partial_sums:
            return 2 * whole
        parts = len(part_bounds(rows, spec.hidden, self._activation_bytes, tp)) - 1
        depths = (-(-spec.heads // tp) * spec.head_dim, -(-spec.ffn // tp))
        products = (self._product(_Product(depth, spec.hidden, bits), rows).seconds for depth in depths)
        return sum(left_of_sum(product, whole, parts) for product in products)

    def _all_reduce(self, rows: int) -> float:
        if self.layout.tp == 1 or not rows:
            return 0.0
        return self.hardware.all_reduce[self.layout.tp](
            rows * self.model.spec.hidden * self._activation_bytes
        )
