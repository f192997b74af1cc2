"""Which rank holds which interval of which parameter under a layout. No torch.

Everything about weights derives from here: loading, re-shard copy lists, fused device tensors, memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Coordinate, Layout
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.core.moe import MoESpec
from seesaw.models.parameters import (
    EMBEDDING,
    FINAL_NORM,
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
    "LayerPart",
    "Mode",
    "Part",
    "RankView",
    "Region",
    "Shard",
    "Sharding",
    "Share",
    "TensorChange",
    "check_layout",
    "copy_list",
    "device_tensors",
    "edge_tensors",
    "head_weight_in_layers",
    "layer_parts",
    "layer_tensors",
    "make_sharding",
    "part_tensors",
    "partition",
    "plan_peak_bytes",
    "rank_view",
    "shards",
    "shares",
    "split_stages",
    "weight_bytes",
]


@dataclass(frozen=True, slots=True)
class Sharding:
    """Who holds what: a layout, its stage split, and which rank sits where.

    `stages` are the layer ranges of the pipeline stages: contiguous, perhaps uneven, none empty.
    `ranks[i]` is the rank that takes coordinate number i (`layout.coordinate(i)`).
    `carried[i]` says of how many FFN columns, the last ones of the layer before its first, stage i relieves the stage
    in front of it, which has that layer's attention, KV and other columns; empty if no layer is divided. Build one
    with `make_sharding`, which checks all of it.
    """

    layout: Layout
    stages: tuple[range, ...]
    ranks: tuple[int, ...]
    carried: tuple[int, ...] = ()

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a tensor-parallel index holds of every axis that is divided (`models.parameters.Axis`)."""

    q_heads: range
    kv_heads: range
    owns_kv: bool
    """False if its KV heads are a replica of another index's."""
    ffn: range
    vocab: range
    expert_ffn: range
    shared_ffn: range


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What a pipeline stage has of a layer."""

    layer: int
    attention: bool
    """False of a layer whose FFN alone is carried on from the stage before."""
    ffn: range
    """Columns of a dense FFN, over all ranks of the stage."""


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
    carried: range = range(0)
    """FFN columns, of the layer before the stage's first, that the rank computes (`Sharding.carried`)."""
    last_ffn: range | None = None
    """FFN columns of the stage's last layer, if the next stage computes others; all else has `ffn`."""


def partition(count: int, parts: int, index: int) -> range:
    """Part `index` of `count` items divided as evenly as possible; the first parts get the rest."""
    size, extra = divmod(count, parts)
    start = index * size + min(index, extra)
    return range(start, start + size + (index < extra))


def check_layout(spec: ModelSpec, layout: Layout, moe: MoESpec | None = None) -> None:
    """Raise `LayoutError`, with the numbers, if a rank would get no layer, query head, FFN column or row."""
    if layout.pp > spec.layers:
        raise LayoutError(
            f"layout {layout}: {layout.pp} pipeline stages need {layout.pp} layers, "
            f"the model has {spec.layers}"
        )
    axes = [(spec.heads, "query heads")]
    if moe is None or moe.sparse_layers < spec.layers:
        axes.append((spec.ffn, "FFN columns"))
    if moe is not None:
        axes.append((moe.expert_ffn, "columns of an expert"))
        axes += [(moe.shared_ffn, "columns of the shared expert")] if moe.shared_ffn else []
    axes.append((spec.vocab, "vocabulary rows"))
    for count, what in axes:
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
    carried: tuple[int, ...] = (),
    moe: MoESpec | None = None,
) -> Sharding:
    """A checked sharding. Without `stages` they come from `split_stages` with `head_weight`; ranks default to
    0, 1, … in coordinate order, and no layer is divided. Raises `LayoutError`."""
    check_layout(spec, layout, moe)
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
    if carried:
        _check_carried(spec, layout, stages, carried, moe)
    return Sharding(layout, stages, ranks, carried if any(carried) else ())


def _check_carried(
    spec: ModelSpec, layout: Layout, stages: tuple[range, ...], carried: tuple[int, ...], moe: MoESpec | None
) -> None:
    if len(carried) != layout.pp or carried[0]:
        raise LayoutError(
            f"layout {layout}: carried {list(carried)} must have one number for each of {layout.pp} stages, "
            "0 for the first"
        )
    for stage, columns in zip(stages, carried, strict=True):
        if columns and not layout.tp <= columns <= spec.ffn - layout.tp:
            raise LayoutError(
                f"layout {layout}: {columns} of {spec.ffn} FFN columns carried leave some of {layout.tp} ranks none"
            )
        if columns and moe and stage.start - 1 in moe.sparse:
            raise LayoutError(
                f"layout {layout}: layer {stage.start - 1} is sparse, its FFN cannot be divided"
            )


def layer_parts(spec: ModelSpec, sharding: Sharding, stage: int) -> tuple[LayerPart, ...]:
    """What a stage has of each layer that it has anything of, in order."""
    layers, whole = sharding.stages[stage], range(spec.ffn)
    parts = [LayerPart(layer, True, whole) for layer in layers]
    if not sharding.carried:
        return tuple(parts)
    if stage + 1 < len(sharding.stages):
        parts[-1] = replace(parts[-1], ffn=range(spec.ffn - sharding.carried[stage + 1]))
    if sharding.carried[stage]:
        tail = range(spec.ffn - sharding.carried[stage], spec.ffn)
        parts.insert(0, LayerPart(layers.start - 1, False, tail))
    return tuple(parts)


def _share_of(share: Share, columns: range, tp: int, index: int) -> Share:
    """`share` where the ranks of the stage have `columns` of the FFN instead of all."""
    own = partition(len(columns), tp, index)
    return replace(share, ffn=range(columns.start + own.start, columns.start + own.stop))


def rank_view(spec: ModelSpec, sharding: Sharding, rank: int) -> RankView:
    """What `rank` holds and whom it talks to. Raises `LayoutError` if the sharding does not include it."""
    layout = sharding.layout
    at = sharding.coordinate(rank)
    share = shares(spec, layout.tp)[at.tp]
    last = layout.pp - 1
    parts = layer_parts(spec, sharding, at.pp)
    carried, divided = not parts[0].attention, len(parts[-1].ffn) < spec.ffn
    return RankView(
        rank=rank,
        coordinate=at,
        layers=sharding.stages[at.pp],
        q_heads=share.q_heads,
        kv_heads=share.kv_heads,
        ffn=share.ffn,
        vocab=share.vocab,
        owns_kv=share.owns_kv,
        first_stage=at.pp == 0,
        last_stage=at.pp == last,
        tp_ranks=tuple(sharding.rank(at.dp, at.pp, tp) for tp in range(layout.tp)),
        previous_rank=sharding.rank(at.dp, at.pp - 1, at.tp) if at.pp > 0 else None,
        next_rank=sharding.rank(at.dp, at.pp + 1, at.tp) if at.pp < last else None,
        first_stage_ranks=tuple(sharding.rank(at.dp, 0, tp) for tp in range(layout.tp)),
        sampler_rank=sharding.rank(at.dp, last, 0),
        carried=_share_of(share, parts[0].ffn, layout.tp, at.tp).ffn if carried else range(0),
        last_ffn=_share_of(share, parts[-1].ffn, layout.tp, at.tp).ffn if divided else None,
    )


@lru_cache(maxsize=256)
def shares(spec: ModelSpec, tp: int, moe: MoESpec | None = None) -> tuple[Share, ...]:
    """What each tensor-parallel index of `tp` holds. `check_layout` has accepted `tp`."""
    return tuple(_share(spec, moe, tp, index) for index in range(tp))


def _share(spec: ModelSpec, moe: MoESpec | None, tp: int, index: int) -> Share:
    q_heads, kv_heads, owns_kv = _heads(spec, tp, index)
    return Share(
        q_heads=q_heads,
        kv_heads=kv_heads,
        owns_kv=owns_kv,
        ffn=partition(spec.ffn, tp, index),
        vocab=partition(spec.vocab, tp, index),
        expert_ffn=partition(moe.expert_ffn if moe else 0, tp, index),
        shared_ffn=partition(moe.shared_ffn if moe else 0, tp, index),
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


def device_tensors(
    spec: ModelSpec, sharding: Sharding, rank: int, moe: MoESpec | None = None
) -> tuple[DeviceTensor, ...]:
    """The tensors in `rank`'s memory: embedding, its layers in order, final norm, LM head.

    With tied embeddings a rank that has both the first and the last stage holds `embed.weight` only.
    """
    at, last = sharding.coordinate(rank), sharding.layout.pp - 1
    share = shares(spec, sharding.layout.tp, moe)[at.tp]
    before, after = edge_tensors(spec, share, first=at.pp == 0, last=at.pp == last)
    parts = layer_parts(spec, sharding, at.pp)
    layers = (tensor for part in parts for tensor in part_tensors(spec, part, sharding.layout.tp, at.tp, moe))
    return (*before, *layers, *after)


def weight_bytes(spec: ModelSpec, sharding: Sharding, rank: int, dtype: str) -> int:
    """Bytes of all device tensors of `rank` with elements of `dtype`."""
    return sum(tensor.size for tensor in device_tensors(spec, sharding, rank)) * DTYPE_BYTES[dtype]


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
    ("router.weight", ("mlp.gate.weight",)),
    ("experts.gate_up.weight", ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")),
    ("experts.down.weight", ("mlp.experts.down_proj.weight",)),
    ("shared.gate_up.weight", ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")),
    ("shared.down.weight", ("mlp.shared_expert.down_proj.weight",)),
    ("shared.gate.weight", ("mlp.shared_expert_gate.weight",)),
)
"""Device tensors of a layer, and the parameters stacked in each; a model has all of a row or none."""


_CARRIED_TENSORS = {"post_norm.weight", "gate_up.weight", "gate_up.bias", "down.weight"}
"""Those of a layer whose FFN alone is carried on: the bias of its result is added where its attention is."""


def part_tensors(
    spec: ModelSpec, part: LayerPart, tp: int, index: int, moe: MoESpec | None = None
) -> list[DeviceTensor]:
    """Device tensors of what a stage has of a layer, for a tensor-parallel index of `tp`."""
    share = shares(spec, tp, moe)[index]
    if len(part.ffn) == spec.ffn:
        return layer_tensors(spec, share, part.layer, moe)
    tensors = layer_tensors(spec, _share_of(share, part.ffn, tp, index), part.layer, moe)
    if part.attention:
        return tensors
    return [tensor for tensor in tensors if tensor.name.split(".", 2)[2] in _CARRIED_TENSORS]


def layer_tensors(
    spec: ModelSpec, share: Share, layer: int, moe: MoESpec | None = None
) -> list[DeviceTensor]:
    """Device tensors of one layer for a tensor-parallel index."""
    prefix = f"model.layers.{layer}."
    of_layer = {
        parameter.name.removeprefix(prefix): parameter for parameter in layer_parameters(spec, layer, moe)
    }
    return [
        _stack(f"layers.{layer}.{name}", [of_layer[suffix] for suffix in suffixes], share)
        for name, suffixes in _LAYER_TENSORS
        if suffixes[0] in of_layer
    ]


def edge_tensors(
    spec: ModelSpec, share: Share, *, first: bool, last: bool
) -> tuple[list[DeviceTensor], list[DeviceTensor]]:
    """Device tensors before the layers and after them, on a rank of the first stage, the last one, or both."""
    outer = {parameter.name: parameter for parameter in edge_parameters(spec)}
    before: list[DeviceTensor] = []
    after: list[DeviceTensor] = []
    if first:
        before.append(_stack("embed.weight", [outer[EMBEDDING]], share))
    if last:
        after.append(_stack("norm.weight", [outer[FINAL_NORM]], share))
        if not (spec.tied_embeddings and first):
            after.append(_stack("head.weight", [outer[head_parameter(spec)]], share))
    return before, after


def _stack(name: str, parameters: Iterable[Parameter], share: Share) -> DeviceTensor:
    parts: list[Part] = []
    rows, matrix = 0, False
    shape: tuple[int, ...] = ()
    for parameter in parameters:
        shard = _shard(parameter, share)
        parts.append(Part(shard, rows))
        shape, matrix = shard.shape, parameter.matrix
        rows += shape[0]
    return DeviceTensor(name, (rows, *shape[1:]), tuple(parts), matrix)


def _shard(parameter: Parameter, share: Share) -> Shard:
    region = [Interval(0, extent) for extent in parameter.shape]
    if parameter.split is not None:
        held: range = getattr(share, parameter.split.axis)
        unit = parameter.split.unit
        region[parameter.split.dim] = Interval(held.start * unit, held.stop * unit)
    return Shard(parameter.name, tuple(region))


def copy_list(spec: ModelSpec, old: Sharding | None, new: Sharding, rank: int) -> CopyList:
    """What `rank` keeps and fetches to change from `old` (None: it has nothing) to `new`.

    Minimal: fetched is exactly what `new` gives the rank and `old` did not.
    """
    return copy_list_between(_tensors_held(spec, old, rank), device_tensors(spec, new, rank))


def reload_list(spec: ModelSpec, old: Sharding | None, new: Sharding, rank: int) -> CopyList:
    """What `rank` drops and fetches to change from `old` to `new` without keeping anything."""
    fresh = copy_list_between((), device_tensors(spec, new, rank))
    return CopyList(fresh.changes, _tensors_held(spec, old, rank))


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
