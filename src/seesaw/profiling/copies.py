"""Copies between host memory and a rank, and within a rank, as the engine makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, cast

import torch

from seesaw.core.devices import kind_of
from seesaw.core.layout import Layout
from seesaw.core.model_spec import DType, ModelSpec, RopeSpec
from seesaw.device.base import Device
from seesaw.kv.transfers import SlabCopy, swap_in, swap_out
from seesaw.profiling.clock import Call
from seesaw.profiling.operands import Operands
from seesaw.profiling.operators import BLOCK_SIZE, Heads
from seesaw.weights.reshard import RankWeights, TransitionStats
from seesaw.weights.sharding import Sharding, make_sharding
from seesaw.weights.store import HostWeightStore

Kind = Literal["to_host", "to_device", "fetch", "within"]
"""KV out, KV in, weights from the host store, weights of the rank that get a new shape."""
_LAYERS = 4
_SPEC = ModelSpec(
    family="llama",
    layers=4,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=64,
    ffn=2816,
    vocab=8192,
    max_position=256,
    rms_eps=1e-5,
    rope=RopeSpec(),
)
_DEVICE_SPEC = replace(_SPEC, layers=1, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336)
"""Whose weights change; on accelerators of some 600 MB, beside which a few launches do not count."""


def copy_calls(
    operands: Operands, host: Operands, kind: Kind, dtype: str, heads: Heads, copy: SlabCopy | None = None
) -> tuple[list[Call], int]:
    """Calls that copy blocks of KV, and the bytes of each: an eighth of all at a time, in random order, as sequences
    come and go. `operands` are the rank's, `host` lies in host memory; `copy` is how a device reaches that."""
    element: torch.dtype = getattr(torch, dtype)
    block = (_LAYERS, 2, heads.kv, BLOCK_SIZE, heads.dim)
    size = torch.Size(block).numel() * element.itemsize
    count = min(operands.bytes, host.bytes) // size
    (pool,) = operands.cut((count, *block), element, most=1)
    (buffer,) = host.cut((count, *block), element, most=1)
    pairs = torch.stack([torch.randperm(count), torch.randperm(count)], dim=1)
    parts = [part.contiguous() for part in pairs.chunk(min(8, count))]
    swap = swap_out if kind == "to_host" else swap_in
    move = partial(swap, pool, buffer, layers=range(_LAYERS), kv_heads=range(heads.kv), copy=copy)
    equal = [part for part in parts if len(part) == len(parts[0])]
    return [partial(move, part) for part in equal], len(parts[0]) * size


@contextmanager
def reshard_seconds(
    kind: Kind, dtype: str, place: Device, clock: Callable[[], float]
) -> Iterator[Callable[[], float]]:
    """A function that changes a rank's weights between one rank's shards and half of them, and tells a byte's
    seconds of one way: of what is copied within the rank where it gives half away, of what is fetched from the host
    where it gets it back."""
    element = cast(DType, dtype)
    spec = _SPEC if kind_of(place.name).on_host else _DEVICE_SPEC
    whole, half = (make_sharding(spec, Layout.parse(text)) for text in ("D2", "T2"))
    with (
        HostWeightStore.dummy(spec, element, seed=0) as store,
        closing(RankWeights(spec, store, element, 0, device=place)) as weights,
    ):
        weights.load(whole)

        def change(target: Sharding) -> tuple[float, TransitionStats]:
            started = clock()
            stats = weights.transition(target, "delta")
            return clock() - started, stats

        def told() -> float:
            away, gave = change(half)
            back, got = change(whole)
            each = away / gave.bytes_copied
            if kind == "within":
                return each
            return max(back - got.bytes_copied * each, 0.2 * back) / got.bytes_fetched

        yield told
