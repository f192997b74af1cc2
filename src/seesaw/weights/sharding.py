"""Which rank holds which interval of which parameter under a layout. No torch.

Everything about weights derives from here: loading, re-shard copy lists, fused device tensors, memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Coordinate, Layout
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.models.parameters import (
    EMBEDDING,
    FINAL_NORM,
    Axis,
    Parameter,
    edge_parameters,
    head_parameter,
    layer_parameters,
)
from seesaw.weights.changes import (
    CopyList,
    FetchCopy,
    KeepCopy,
    Mode,
    TensorChange,
    copy_list_between,
    peak_elements,
)
from seesaw.weights.intervals import DeviceTensor, Interval, Part, Region, Shard
from seesaw.weights.stages import head_weight_in_layers, split_stages

__all__ = [
    "CopyList",
    "DeviceTensor",
    "FetchCopy",
    "Interval",
    "KeepCopy",
    "Mode",
    "Part",
    "RankView",
    "Region",
    "Shard",
    "Sharding",
    "TensorChange",
    "assign_ranks",
    "check_layout",
    "copy_list",
    "device_tensors",
    "head_weight_in_layers",
    "kept_elements",
    "make_sharding",
    "partition",
    "plan_peak_bytes",
    "rank_view",
    "shards",
    "split_stages",
    "weight_bytes",
]


@dataclass(frozen=True, slots=True)
class Sharding:
    """Who holds what: a layout, its stage split, and which rank sits where.

    `stages` are the layer ranges of the pipeline stages: contiguous, perhaps uneven, none empty.
    `ranks[i]` is the rank that takes coordinate number i (`layout.coordinate(i)`). Build one with
    `make_sharding`, which checks both.
    """

    layout: Layout
    stages: tuple[range, ...]
    ranks: tuple[int, ...]

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of `rank`. Raises `LayoutError` if the sharding does not include it."""
        if rank not in self.ranks:
            raise LayoutError(
                f"rank {rank}: the sharding {self.layout} is over the ranks {sorted(self.ranks)}"
            )
        return self.layout.coordinate(self.ranks.index(rank))

    def rank(self, dp: int, pp: int, tp: int) -> int:
        """The rank at a coordinate."""
        return self.ranks[self.layout.index(Coordinate(dp, pp, tp))]


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank's part of a sharding, in global index ranges. All ranks named are those of its own replica.

    `vocab` are the rows of the embedding and the LM head, on the stages that have them. `owns_kv` is False on
    ranks whose KV heads are a replica of another rank's (TP > KV heads); only owners write KV to the host.
    """

    rank: int
    coordinate: Coordinate
    layers: range
    q_heads: range
    kv_heads: range
    ffn: range
    vocab: range
    owns_kv: bool
    first_stage: bool
    last_stage: bool
    tp_ranks: tuple[int, ...]
    """Ranks of this stage in tensor-parallel order, itself included."""
    previous_rank: int | None
    next_rank: int | None
    """The ranks of the same tensor-parallel index in the neighbour stages."""
    first_stage_ranks: tuple[int, ...]
    sampler_rank: int
    """Tensor-parallel index 0 of the last stage."""


def partition(count: int, parts: int, index: int) -> range:
    """Part `index` of `count` items divided as evenly as possible; the first parts get the rest."""
    size, extra = divmod(count, parts)
    start = index * size + min(index, extra)
    return range(start, start + size + (index < extra))


def check_layout(spec: ModelSpec, layout: Layout) -> None:
    """Raise `LayoutError`, with the numbers, if a rank would get no layer, query head, FFN column or row."""
    if layout.pp > spec.layers:
        raise LayoutError(
            f"layout {layout}: {layout.pp} pipeline stages need {layout.pp} layers, "
            f"the model has {spec.layers}"
        )
    for count, what in (
        (spec.heads, "query heads"),
        (spec.ffn, "FFN columns"),
        (spec.vocab, "vocabulary rows"),
    ):
        if layout.tp > count:
            raise LayoutError(
                f"layout {layout}: {layout.tp} tensor-parallel ranks cannot share {count} {what}"
            )


def make_sharding(
    spec: ModelSpec,
    layout: Layout,
    *,
    stages: tuple[range, ...] | None = None,
    head_weight: float = 0.0,
    ranks: tuple[int, ...] | None = None,
) -> Sharding:
    """A checked sharding. Without `stages` they come from `split_stages` with `head_weight`; ranks default to
    0, 1, … in coordinate order. Raises `LayoutError`."""
    check_layout(spec, layout)
    if stages is None:
        stages = split_stages(spec, layout.pp, head_weight)
    if ranks is None:
        ranks = tuple(range(layout.world))
    ends = [0, *(stage.stop for stage in stages)]
    contiguous = all(
        stage.step == 1 and stage.start == start < stage.stop
        for stage, start in zip(stages, ends, strict=False)
    )
    if len(stages) != layout.pp or not contiguous or ends[-1] != spec.layers:
        raise LayoutError(
            f"layout {layout}: the stages {[(s.start, s.stop) for s in stages]} do not divide "
            f"{spec.layers} layers into {layout.pp} contiguous, non-empty ranges"
        )
    if len(ranks) != layout.world or len(set(ranks)) != len(ranks):
        raise LayoutError(f"layout {layout}: needs {layout.world} different ranks, got {list(ranks)}")
    return Sharding(layout, stages, ranks)


def rank_view(spec: ModelSpec, sharding: Sharding, rank: int) -> RankView:
    """What `rank` holds and whom it talks to. Raises `LayoutError` if the sharding does not include it."""
    layout = sharding.layout
    at = sharding.coordinate(rank)
    q_heads, kv_heads, owns_kv = _heads(spec, layout.tp, at.tp)
    last = layout.pp - 1
    return RankView(
        rank=rank,
        coordinate=at,
        layers=sharding.stages[at.pp],
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn=partition(spec.ffn, layout.tp, at.tp),
        vocab=partition(spec.vocab, layout.tp, at.tp),
        owns_kv=owns_kv,
        first_stage=at.pp == 0,
        last_stage=at.pp == last,
        tp_ranks=tuple(sharding.rank(at.dp, at.pp, tp) for tp in range(layout.tp)),
        previous_rank=sharding.rank(at.dp, at.pp - 1, at.tp) if at.pp > 0 else None,
        next_rank=sharding.rank(at.dp, at.pp + 1, at.tp) if at.pp < last else None,
        first_stage_ranks=tuple(sharding.rank(at.dp, 0, tp) for tp in range(layout.tp)),
        sampler_rank=sharding.rank(at.dp, last, 0),
    )


def _heads(spec: ModelSpec, tp: int, index: int) -> tuple[range, range, bool]:
    """Query heads, KV heads and ownership of the KV heads at tensor-parallel index `index`."""
    assert spec.heads % spec.kv_heads == 0, "query heads come in equal groups"
    group = spec.heads // spec.kv_heads
    if tp <= spec.kv_heads:
        kv = partition(spec.kv_heads, tp, index)
        return range(kv.start * group, kv.stop * group), kv, True
    head = index * spec.kv_heads // tp
    first = -(-head * tp // spec.kv_heads)
    end = -(-(head + 1) * tp // spec.kv_heads)
    share = partition(group, end - first, index - first)
    queries = range(head * group + share.start, head * group + share.stop)
    return queries, range(head, head + 1), index == first


def shards(spec: ModelSpec, sharding: Sharding, rank: int) -> tuple[Shard, ...]:
    """All shards `rank` holds, each parameter at most once, in the order of its device tensors."""
    return tuple(part.shard for tensor in device_tensors(spec, sharding, rank) for part in tensor.parts)


def device_tensors(spec: ModelSpec, sharding: Sharding, rank: int) -> tuple[DeviceTensor, ...]:
    """The tensors in `rank`'s memory: embedding, its layers in order, final norm, LM head.

    With tied embeddings a rank that has both the first and the last stage holds `embed.weight` only.
    """
    view = rank_view(spec, sharding, rank)
    before, after = _edge_tensors(spec, view)
    layers = (tensor for layer in view.layers for tensor in _layer_tensors(spec, view, layer))
    return (*before, *layers, *after)


def weight_bytes(spec: ModelSpec, sharding: Sharding, rank: int, dtype: str) -> int:
    """Bytes of all device tensors of `rank` with elements of `dtype`."""
    view = rank_view(spec, sharding, rank)
    before, after = _edge_tensors(spec, view)
    layer = sum(tensor.size for tensor in _layer_tensors(spec, view, view.layers.start))
    edges = sum(tensor.size for tensor in (*before, *after))
    return (edges + layer * len(view.layers)) * DTYPE_BYTES[dtype]


_LAYER_TENSORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_norm.weight", ("input_layernorm.weight",)),
    ("qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
    ("qkv.bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    ("q_norm.weight", ("self_attn.q_norm.weight",)),
    ("k_norm.weight", ("self_attn.k_norm.weight",)),
    ("o.weight", ("self_attn.o_proj.weight",)),
    ("o.bias", ("self_attn.o_proj.bias",)),
    ("post_norm.weight", ("post_attention_layernorm.weight",)),
    ("gate_up.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("gate_up.bias", ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    ("down.weight", ("mlp.down_proj.weight",)),
    ("down.bias", ("mlp.down_proj.bias",)),
)
"""Device tensors of a layer, and the parameters stacked in each; a model has all of a row or none."""


def _layer_tensors(spec: ModelSpec, view: RankView, layer: int) -> list[DeviceTensor]:
    prefix = f"model.layers.{layer}."
    of_layer = {parameter.name.removeprefix(prefix): parameter for parameter in layer_parameters(spec, layer)}
    return [
        _stack(f"layers.{layer}.{name}", (_shard(of_layer[suffix], view) for suffix in suffixes))
        for name, suffixes in _LAYER_TENSORS
        if suffixes[0] in of_layer
    ]


def _edge_tensors(spec: ModelSpec, view: RankView) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
    """Device tensors before the layers and after them."""
    outer = {parameter.name: parameter for parameter in edge_parameters(spec)}
    before: list[DeviceTensor] = []
    after: list[DeviceTensor] = []
    if view.first_stage:
        before.append(_stack("embed.weight", [_shard(outer[EMBEDDING], view)]))
    if view.last_stage:
        after.append(_stack("norm.weight", [_shard(outer[FINAL_NORM], view)]))
        if not (spec.tied_embeddings and view.first_stage):
            after.append(_stack("head.weight", [_shard(outer[head_parameter(spec)], view)]))
    return before, after


def _shard(parameter: Parameter, view: RankView) -> Shard:
    region = [Interval(0, extent) for extent in parameter.shape]
    if parameter.split is not None:
        held = _held(view, parameter.split.axis)
        unit = parameter.split.unit
        region[parameter.split.dim] = Interval(held.start * unit, held.stop * unit)
    return Shard(parameter.name, tuple(region))


def _held(view: RankView, axis: Axis) -> range:
    ranges = {"q_heads": view.q_heads, "kv_heads": view.kv_heads, "ffn": view.ffn, "vocab": view.vocab}
    return ranges[axis]


def _stack(name: str, pieces: Iterable[Shard]) -> DeviceTensor:
    parts: list[Part] = []
    rows = 0
    shape: tuple[int, ...] = ()
    for shard in pieces:
        parts.append(Part(shard, rows))
        shape = shard.shape
        rows += shape[0]
    return DeviceTensor(name, (rows, *shape[1:]), tuple(parts))


def copy_list(spec: ModelSpec, old: Sharding | None, new: Sharding, rank: int) -> CopyList:
    """What `rank` keeps and fetches to change from `old` (None: it has nothing) to `new`.

    Minimal: fetched is exactly what `new` gives the rank and `old` did not.
    """
    return copy_list_between(_tensors_held(spec, old, rank), device_tensors(spec, new, rank))


def plan_peak_bytes(
    spec: ModelSpec, old: Sharding | None, new: Sharding, *, mode: Mode, dtype: str, rank: int
) -> int:
    """Most bytes of device tensors that `rank` holds at once while it changes from `old` to `new`.

    Exactly what `weights.reshard.RankWeights` reaches. `old` is None, or does not include the rank, when the
    rank holds nothing.
    """
    peak = peak_elements(_tensors_held(spec, old, rank), device_tensors(spec, new, rank), mode)
    return peak * DTYPE_BYTES[dtype]


def _tensors_held(spec: ModelSpec, sharding: Sharding | None, rank: int) -> tuple[DeviceTensor, ...]:
    return device_tensors(spec, sharding, rank) if sharding and rank in sharding.ranks else ()


def assign_ranks(spec: ModelSpec, old: Sharding, new: Sharding) -> Sharding:
    """`new` with its ranks permuted so that changing from `old` fetches the fewest bytes over all ranks.

    Among equals, as many ranks as possible stay where `new` has them. Ranks that `old` does not include have
    nothing to keep.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    by_coordinate = kept_elements(spec, old, new)
    width = new.layout.replica_ranks
    kept = np.zeros((new.layout.world, new.layout.world), dtype=np.int64)
    for row, rank in enumerate(new.ranks):
        if rank in old.ranks:
            place = old.ranks.index(rank) % old.layout.replica_ranks
            kept[row] = np.tile(by_coordinate[place], new.layout.world // width)
    # The count of ranks that stay can only decide between equal sums of kept elements.
    value = kept * (len(new.ranks) + 1) + np.eye(len(new.ranks), dtype=np.int64)
    rows, columns = linear_sum_assignment(value, maximize=True)
    taken = {int(column): new.ranks[row] for row, column in zip(rows, columns, strict=True)}
    return replace(new, ranks=tuple(taken[index] for index in range(new.layout.world)))


def kept_elements(spec: ModelSpec, old: Sharding, new: Sharding) -> NDArray[np.int64]:
    """Elements that a rank keeps which changes places: `[place in an old replica, place in a new replica]`.

    Places are counted with tp fastest, then pp. Depends on layouts and stages, not on who sits where.
    """
    layer = np.zeros((old.layout.tp, new.layout.tp), dtype=np.int64)
    for parameter in layer_parameters(spec, 0):
        layer += _overlap_elements(spec, parameter, old, new)
    layers = _overlap(old.stages, new.stages)
    kept = np.kron(layers, layer)
    for parameter in edge_parameters(spec):
        stages = np.outer(_stages_with(spec, parameter, old), _stages_with(spec, parameter, new))
        kept += np.kron(stages, _overlap_elements(spec, parameter, old, new))
    return kept


def _overlap_elements(
    spec: ModelSpec, parameter: Parameter, old: Sharding, new: Sharding
) -> NDArray[np.int64]:
    """Elements of `parameter` that an old and a new tensor-parallel index share."""
    if parameter.split is None:
        return np.full((old.layout.tp, new.layout.tp), parameter.size, dtype=np.int64)
    axis, dim, unit = parameter.split.axis, parameter.split.dim, parameter.split.unit
    ranges = [
        [_held(rank_view(spec, sharding, sharding.rank(0, 0, tp)), axis) for tp in range(sharding.layout.tp)]
        for sharding in (old, new)
    ]
    return _overlap(*ranges) * (parameter.size // parameter.shape[dim] * unit)


def _overlap(left: Sequence[range], right: Sequence[range]) -> NDArray[np.int64]:
    """Lengths of the intersections of all pairs."""
    starts = np.maximum.outer([r.start for r in left], [r.start for r in right])
    stops = np.minimum.outer([r.stop for r in left], [r.stop for r in right])
    shared: NDArray[np.int64] = np.maximum(stops - starts, 0).astype(np.int64)
    return shared


def _stages_with(spec: ModelSpec, parameter: Parameter, sharding: Sharding) -> NDArray[np.int64]:
    """1 for the stages that hold an edge parameter, else 0."""
    stages = np.zeros(sharding.layout.pp, dtype=np.int64)
    if parameter.place == "embed":
        stages[0] = 1
    if parameter.place == "head" or parameter.name == head_parameter(spec):
        stages[-1] = 1
    return stages
