"""`HardwareSpec`: what a node's ranks, links and host can do, as the cost model needs it. From the catalogue
(`planning.catalogue`) or measured (`seesaw profile`)."""

from __future__ import annotations

from bisect import bisect_right
from math import exp, log
from typing import Literal

import msgspec

from seesaw.core.errors import ConfigError


class Curve(msgspec.Struct, frozen=True):
    """A positive function of a positive size: straight lines between points on logarithmic axes.

    Below the first point and above the last one it stays constant, or follows the outermost line if `extends`.
    """

    sizes: tuple[float, ...]
    values: tuple[float, ...]
    extends: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.values):
            raise ConfigError(
                f"a curve of {len(self.sizes)} sizes and {len(self.values)} values: give as many of both"
            )
        if min(*self.sizes, *self.values) <= 0 or any(
            a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)
        ):
            raise ConfigError("a curve's sizes must be positive and rise, and its values be positive")

    def __call__(self, size: float) -> float:
        """The value at `size`."""
        last = len(self.sizes) - 1
        if last == 0 or (not self.extends and not self.sizes[0] < size < self.sizes[last]):
            return self.values[0] if size <= self.sizes[0] else self.values[last]
        i = min(max(bisect_right(self.sizes, size) - 1, 0), last - 1)
        x0, x1 = log(self.sizes[i]), log(self.sizes[i + 1])
        y0, y1 = log(self.values[i]), log(self.values[i + 1])
        return exp(y0 + (y1 - y0) * (log(size) - x0) / (x1 - x0))


class TypeCurves(msgspec.Struct, frozen=True, kw_only=True):
    """How operators behave with one type of operands. Fields of `HardwareSpec` of the same name say what they are."""

    product: Curve
    prefill_attention: Curve
    decode_attention: Curve
    token_of_query: float = 0.0
    token_of_kv: float = 0.0


class HardwareSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A node of equal ranks. Units are bytes, seconds, flops and bytes per second; rates are of one rank."""

    name: str
    """Of one device, such as `L4`, or of a profiled machine."""
    ranks: int
    """Devices in the node."""
    device: Literal["cuda", "cpu"]
    memory: int
    """Bytes of a device."""
    flops: dict[str, float]
    """Highest rate of matrix products by type of the operands (`bfloat16`, `float16`, `float32`, `fp8`, `int8`)."""
    bandwidth: float
    """At which weights are streamed in a product of one row."""
    product: Curve
    """Share of `flops` that a product reaches where arithmetic bounds it, by number of rows."""
    prefill_attention: Curve
    """Share of `flops` that causal attention reaches, by flops of one layer's attention on one rank.

    These are 4 x heads of the rank x head_dim x (query, key) pairs, of all sequences of the batch together: that
    explains measurements better than the flops or the tokens of one sequence.
    """
    decode_attention: Curve
    """Share of `bandwidth` at which decode attention reads KV, by bytes of K and V read in one layer by one rank."""
    operator_overhead: float
    """Seconds that each operator costs beside its work, as it is found in a step: others had the caches before."""
    step_overhead: float
    """Seconds that each Forward costs a stage beside its operators."""
    all_reduce: dict[int, Curve]
    """Seconds by bytes of the tensor, for groups of so many ranks."""
    send: Curve
    """Seconds of a hand-over between neighbouring stages, by bytes."""
    to_device: float
    """From host memory, one rank alone."""
    to_host: float
    node_to_device: float
    """From host memory, all ranks together."""
    node_to_host: float
    device_copy: float
    """Bytes copied within a device, each of which is read and written."""
    fetch: float | None = None
    """At which a rank gets weights from the host while all do; None is `to_device`, or its share of the node's."""
    layer_overhead: float = 0.0
    """Seconds that each layer costs a stage beside its operators."""
    activation_bandwidth: float | None = None
    """At which norms, rotation and the like read and write activations; None is `bandwidth`."""
    token_of_query: float = 0.0
    """Seconds of attention for each new token and channel of the rank's queries (heads x head_dim), whatever the
    context."""
    token_of_kv: float = 0.0
    """The same by channels of K: writing K and V into the pool, bringing them into the kernel's order."""
    waiting: dict[int, Curve] = {}
    """Share of their time for which the ranks of a group of so many wait for the slowest of them, by the seconds that
    they work between two meetings: none take exactly as long as the others, time by time."""
    partial_sums: bool = False
    """Whether sums over ranks travel in parts while the product is computed (`core.partial_sums`)."""
    by_type: dict[str, TypeCurves] = {}
    """Curves of single types, where they are known; those above hold for all others."""
    sources: dict[str, str] = {}
    """Where each figure comes from, by field."""

    def curves(self, dtype: str) -> TypeCurves:
        """How operators behave with operands of `dtype`."""
        return self.by_type.get(dtype) or TypeCurves(
            product=self.product,
            prefill_attention=self.prefill_attention,
            decode_attention=self.decode_attention,
            token_of_query=self.token_of_query,
            token_of_kv=self.token_of_kv,
        )
