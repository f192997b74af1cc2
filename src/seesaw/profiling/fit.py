"""From measured times to a `HardwareSpec`: the inverse of `planning.cost`. No torch.

Times are of whole calls. What every operator costs beside its work comes off first, as the cost model adds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import exp, log
from typing import Literal, cast

from seesaw.core.devices import device_kind
from seesaw.core.hardware import Curve, HardwareSpec, TypeCurves
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.profiling.tasks import (
    LINK_SIZES,
    MEETING_ROWS,
    ROWS,
    STEP_LAYERS,
    Sizes,
    Task,
    activations,
    all_reduce,
    attention,
    copy,
    group_sizes,
    product,
    reshard,
    send,
    sizes_for,
    step,
    tiny,
    waiting,
)

Times = Mapping[Task, float]
_LAYER_OPERATORS, _STEP_OPERATORS = 10, 1
"""As `planning.cost` counts them: four products, attention and five small ones; the LM head."""
_LEAST_PART = 0.2
"""Of a call's time that is left to its work, however much the fit of its overheads says."""
_LEAST_WAIT = 1e-4
"""A share of the work's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What is known of a node without measuring it."""

    name: str
    memory: int
    """Bytes of each rank."""


@dataclass(slots=True)
class _Fit:
    times: Times
    sizes: Sizes
    overhead: float
    bandwidth: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)

    # ---- products -----------------------------------------------------------------------------------------

    def rate(self, dtype: str, rows: int) -> tuple[float, float]:
        """Flops and bytes of weights per second."""
        products = self.sizes.products
        seconds = self.work(self.times[product(dtype, rows, self.sizes)], (len(products) - 1) * self.overhead)
        elements = sum(depth * columns for depth, columns in products)
        return 2.0 * rows * elements / seconds, DTYPE_BYTES[dtype] * elements / seconds

    def work(self, seconds: float, more: float = 0.0) -> float:
        """Of a call: without what it costs beside its work."""
        return max(seconds - self.overhead - more, _LEAST_PART * seconds)

    def products(self, dtype: str) -> Curve:
        """Shares of the best rate."""
        return Curve(
            tuple(map(float, ROWS)),
            tuple(self.rate(dtype, rows)[0] / self.flops[dtype] for rows in ROWS),
        )

    # ---- attention ----------------------------------------------------------------------------------------

    def curves(self, dtype: str, device: str) -> TypeCurves:
        """Everything that depends on the type."""
        query, kv = self._token_seconds(dtype) if device_kind(device).on_host else (0.0, 0.0)
        heads, kv_heads, dim = self.sizes.heads
        each = (heads * query + kv_heads * kv) * dim
        prefill: dict[float, float] = {}
        for count, tokens in self.sizes.prefills:
            seconds = self.times[attention(dtype, self.sizes.heads, count, tokens, tokens)]
            flops = count * _flops(self.sizes.heads, tokens)
            prefill[flops] = flops / self.work(seconds, count * tokens * each) / self.flops[dtype]
        decode: dict[float, float] = {}
        for count, tokens in self.sizes.decodes:
            seconds = self.times[attention(dtype, self.sizes.heads, count, tokens, 1)]
            moved = 2.0 * kv_heads * dim * DTYPE_BYTES[dtype] * count * tokens
            decode[moved] = moved / self.work(seconds, count * each) / self.bandwidth
        return TypeCurves(
            product=self.products(dtype),
            prefill_attention=Curve(tuple(prefill), tuple(prefill.values())),
            decode_attention=Curve(tuple(decode), tuple(decode.values())),
            token_of_query=query,
            token_of_kv=kv,
        )

    def _token_seconds(self, dtype: str) -> tuple[float, float]:
        """Seconds of attention a token and channel of Q, and of K, whatever the context: least relative squares."""
        rows = []
        for heads in (self.sizes.heads, self.sizes.fewer_kv):
            query, kv, dim = heads
            for count, tokens in self.sizes.prefills:
                seconds = self.times[attention(dtype, heads, count, tokens, tokens)] - self.overhead
                fed = count * tokens * dim
                parts = (fed * query, fed * kv, count * _flops(heads, tokens))
                rows.append([part / seconds for part in parts])
        of_query, of_kv, _ = _positive_least_squares(rows, [1.0] * len(rows))
        return of_query, of_kv


def fit(times: Times, ranks: int, dtypes: Sequence[str], device: str, box: Box) -> HardwareSpec:
    """The node whose measured times these are; `times` has every task of `all_tasks` but those of slow links."""
    sizes, first = sizes_for(device), dtypes[0]
    of_layer, of_step = _overheads(times, first, device)
    found = _Fit(times, sizes, overhead=times[tiny(first)])
    found.bandwidth = max(found.rate(dtype, 1)[1] for dtype in dtypes)
    found.flops = {dtype: max(found.rate(dtype, rows)[0] for rows in ROWS) for dtype in dtypes}
    by_type = {dtype: found.curves(dtype, device) for dtype in dtypes}

    def rate(kind: str, *, alone: bool) -> float:
        return (1 if alone else ranks) / times[copy(kind, first, sizes, alone=alone)]

    device_copy = 1 / times[reshard("within", first)]
    return HardwareSpec(
        name=box.name,
        ranks=ranks,
        device=cast(Literal["cpu", "cuda"], device),
        memory=box.memory,
        flops=found.flops,
        bandwidth=found.bandwidth,
        product=by_type[first].product,
        prefill_attention=by_type[first].prefill_attention,
        decode_attention=by_type[first].decode_attention,
        operator_overhead=found.overhead,
        layer_overhead=of_layer,
        step_overhead=of_step,
        all_reduce=_all_reduces(times, ranks, first),
        send=_line(times, partial(send, first))
        or Curve((1.0, 2.0), (1 / device_copy, 2 / device_copy), True),
        to_device=rate("to_device", alone=True),
        to_host=rate("to_host", alone=True),
        node_to_device=rate("to_device", alone=False),
        node_to_host=rate("to_host", alone=False),
        device_copy=device_copy,
        fetch=1 / times[reshard("fetch", first)],
        activation_bandwidth=_activation_bandwidth(found, first),
        token_of_query=by_type[first].token_of_query,
        token_of_kv=by_type[first].token_of_kv,
        waiting=_waiting(times, ranks, first, sizes) if device_kind(device).on_host else {},
        by_type=by_type,
    )


def _overheads(times: Times, dtype: str, device: str) -> tuple[float, float]:
    """Of a layer and of a step beside their operators, from models of few and of many layers.

    Where the host runs ahead, their steps were measured whole, and their operators have next to nothing to do: what
    each costs anyhow comes off.
    """
    few, many = STEP_LAYERS
    of_few, of_many = times[step(few, dtype)], times[step(many, dtype)]
    of_layer = max(of_many - of_few, 0.0) / (many - few)
    of_step = max(of_few - few * of_layer, 0.1 * of_few)
    if device_kind(device).runs_behind:
        each = times[tiny(dtype)]
        return max(of_layer - _LAYER_OPERATORS * each, 0.0), max(of_step - _STEP_OPERATORS * each, 0.0)
    return of_layer, of_step


def _activation_bandwidth(found: _Fit, dtype: str) -> float:
    """By the bytes that the cost model counts for a layer."""
    sizes, (query, kv, dim) = found.sizes, found.sizes.heads
    width = 8 * sizes.hidden + 3 * (query + 2 * kv) * dim + 3 * sizes.ffn
    seconds = found.work(found.times[activations(dtype, sizes)], 3 * found.overhead)
    return sizes.activation_rows * width * DTYPE_BYTES[dtype] / seconds


def _all_reduces(times: Times, ranks: int, dtype: str) -> dict[int, Curve]:
    found: dict[int, Curve] = {}
    for size in group_sizes(ranks):
        curve = _line(times, partial(all_reduce, dtype, size))
        assert curve is not None, size
        found[size] = curve
    return _all_sizes(found)


def _waiting(times: Times, ranks: int, dtype: str, sizes: Sizes) -> dict[int, Curve]:
    """Without the all-reduce that ranks met in. More work never makes them wait for less."""
    found: dict[int, Curve] = {}
    for size in group_sizes(ranks):
        met = times[all_reduce(dtype, size, LINK_SIZES[0])]
        shares: dict[float, float] = {}
        longest, wait = 0.0, 0.0
        for rows in MEETING_ROWS:
            seconds = times[product(dtype, rows, sizes)]
            if seconds <= longest:
                continue  # a few rows may take as long as one
            share = times[waiting(dtype, size, rows, sizes)] - met / seconds
            longest, wait = seconds, max(seconds * max(share, _LEAST_WAIT), wait)
            shares[seconds] = wait / seconds
        found[size] = Curve(tuple(shares), tuple(shares.values()))
    return _all_sizes(found)


def _all_sizes(measured: Mapping[int, Curve]) -> dict[int, Curve]:
    """Groups that were not measured lie between those that were."""
    found = dict(measured)
    for below, above in pairwise(sorted(measured)):
        for size in range(below + 1, above):
            found[size] = _between(found[below], found[above], log(size / below) / log(above / below))
    return dict(sorted(found.items()))


def _between(one: Curve, other: Curve, weight: float) -> Curve:
    values = (
        exp((1 - weight) * log(value) + weight * log(other(size)))
        for size, value in zip(one.sizes, one.values, strict=True)
    )
    return Curve(one.sizes, tuple(values), one.extends)


def _line(times: Times, task: Callable[[int], Task]) -> Curve | None:
    """Seconds by bytes, which never fall; None if nothing was measured."""
    found = {count: times[task(count)] for count in LINK_SIZES if task(count) in times}
    if not found:
        return None
    values: list[float] = []
    for seconds in found.values():
        values.append(max(seconds, *values[-1:], 0.0))
    return Curve(tuple(map(float, found)), tuple(values), True)


def _flops(heads: tuple[int, int, int], tokens: int) -> float:
    """Of causal attention of one layer over a prompt."""
    return 4.0 * heads[0] * heads[2] * tokens * (tokens + 1) / 2


def _positive_least_squares(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """x of the least |rows x - wanted|, where columns whose x would be negative are left out."""
    import numpy as np

    matrix, target = np.asarray(rows), np.asarray(wanted)
    scale = np.abs(matrix).max(axis=0)
    kept = list(range(matrix.shape[1]))
    result = [0.0] * matrix.shape[1]
    while kept:
        x = np.linalg.lstsq(matrix[:, kept] / scale[kept], target, rcond=None)[0] / scale[kept]
        if (x >= 0).all():
            for column, value in zip(kept, x, strict=True):
                result[column] = float(value)
            break
        kept.remove(kept[int((x * scale[kept]).argmin())])
    return result
