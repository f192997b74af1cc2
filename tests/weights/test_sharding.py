"""Shards of every layout tile every parameter; views, stages and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Coordinate, Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.core.moe import MoESpec
from seesaw.models.parameters import EMBEDDING, Parameter, parameter_count, parameters
from seesaw.weights.sharding import (
    Interval,
    Sharding,
    check_layout,
    device_tensors,
    head_weight_in_layers,
    make_sharding,
    rank_view,
    shards,
    split_stages,
    weight_bytes,
)
from tests.weights.shapes import AWKWARD, carrying, layouts, shardings, spec_of, specs, usable


def assert_tiles(spec: ModelSpec, sharding: Sharding) -> None:
    """Every element of every parameter is held, in each replica by the expected ranks and by no others."""
    layout = sharding.layout
    for replica in range(layout.dp):
        ranks = sharding.ranks[replica * layout.replica_ranks : (replica + 1) * layout.replica_ranks]
        views = {rank: rank_view(spec, sharding, rank) for rank in ranks}
        holders: dict[str, list[tuple[int, tuple[Interval, ...]]]] = defaultdict(list)
        for rank in ranks:
            names = [shard.parameter for shard in shards(spec, sharding, rank)]
            assert len(names) == len(set(names))
            for shard in shards(spec, sharding, rank):
                holders[shard.parameter].append((rank, shard.region))
        assert holders.keys() == {parameter.name for parameter in parameters(spec)}
        for parameter in parameters(spec):
            held = holders[parameter.name]
            stages = {views[rank].coordinate.pp for rank, _ in held}
            assert stages == expected_stages(spec, sharding, parameter)
            if parameter.split and parameter.split.axis == "ffn" and len(stages) == 2:
                assert_boxes_tile(parameter, [box for _, box in held], 2 * layout.tp)
                continue
            for stage in stages:
                here = [(rank, box) for rank, box in held if views[rank].coordinate.pp == stage]
                assert len(here) == layout.tp
                assert_boxes_tile(
                    parameter, [box for _, box in here], distinct_owners(spec, layout, parameter)
                )


def expected_stages(spec: ModelSpec, sharding: Sharding, parameter: Parameter) -> set[int]:
    last = sharding.layout.pp - 1
    if parameter.layer is not None:
        (stage,) = (stage for stage, layers in enumerate(sharding.stages) if parameter.layer in layers)
        carried = *(sharding.carried or (0,) * (last + 1)), 0
        shared = carried[stage + 1] and parameter.layer == sharding.stages[stage][-1]
        needed = ("post_attention_layernorm.weight", "gate_proj.weight", "gate_proj.bias", "up_proj.weight")
        needed = (*needed, "up_proj.bias", "down_proj.weight")
        return {stage, stage + 1} if shared and parameter.name.endswith(needed) else {stage}
    if parameter.name == EMBEDDING:
        return {0, last} if spec.tied_embeddings else {0}
    return {last}


def distinct_owners(spec: ModelSpec, layout: Layout, parameter: Parameter) -> int:
    if parameter.split is None:
        return 1
    return min(layout.tp, spec.kv_heads) if parameter.split.axis == "kv_heads" else layout.tp


def assert_boxes_tile(parameter: Parameter, boxes: list[tuple[Interval, ...]], owners: int) -> None:
    dim = parameter.split.dim if parameter.split else 0
    unit = parameter.split.unit if parameter.split else parameter.shape[0]
    whole = tuple(Interval(0, extent) for extent in parameter.shape)
    assert all(box[:dim] == whole[:dim] and box[dim + 1 :] == whole[dim + 1 :] for box in boxes)
    distinct = sorted({box[dim] for box in boxes})
    assert len(distinct) == owners
    ends = [0, *(stop for _, stop in distinct)]
    assert [start for start, _ in distinct] == ends[:-1] and ends[-1] == parameter.shape[dim]
    assert all(start < stop and start % unit == 0 for start, stop in distinct)


def assert_even(sizes: list[int]) -> None:
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def assert_heads_fit(spec: ModelSpec, sharding: Sharding) -> None:
    """Every query head sits with its KV head, and every KV head has one owner among the ranks of a stage."""
    group = spec.heads // spec.kv_heads
    views = [rank_view(spec, sharding, rank) for rank in sharding.ranks]
    for view in views:
        assert {head // group for head in view.q_heads} == set(view.kv_heads)
        assert all((view.layers, view.q_heads, view.ffn, view.vocab)), "nobody is left without work"
    stage = views[: sharding.layout.tp]
    owned = Counter(head for view in stage if view.owns_kv for head in view.kv_heads)
    assert owned == dict.fromkeys(range(spec.kv_heads), 1)
    assert [head for view in stage for head in view.q_heads] == list(range(spec.heads))
    assert_even([len(view.ffn) for view in stage])
    assert_even([len(view.vocab) for view in stage])
    if sharding.layout.tp <= spec.kv_heads:
        assert_even([len(view.kv_heads) for view in stage])
    else:
        for head in range(spec.kv_heads):
            assert_even([len(view.q_heads) for view in stage if head in view.kv_heads])


@pytest.mark.parametrize("name", AWKWARD)
def test_shards_tile_every_parameter_under_every_layout(name: str) -> None:
    spec = AWKWARD[name]
    tried = 0
    for world in range(1, 17):
        for layout in usable(spec, world):
            sharding = make_sharding(spec, layout, head_weight=head_weight_in_layers(spec))
            for divided in (sharding, carrying(spec, sharding)):
                assert_tiles(spec, divided)
                assert_heads_fit(spec, divided)
            tried += 1
    assert tried >= 30


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_shards_tile_random_models(spec: ModelSpec, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 16))
    layout = data.draw(st.sampled_from(layouts(world)))
    if layout not in usable(spec, world):
        with pytest.raises(LayoutError, match=str(layout)):
            make_sharding(spec, layout)
        return
    sharding = data.draw(shardings(spec, world, most=9))
    assert_tiles(spec, sharding)
    assert_heads_fit(spec, sharding)


@pytest.mark.parametrize("name", AWKWARD)
def test_device_tensors_stack_the_shards(name: str) -> None:
    spec = AWKWARD[name]
    for layout in usable(spec, 6) + usable(spec, 1):
        sharding = make_sharding(spec, layout)
        for rank in sharding.ranks:
            tensors = device_tensors(spec, sharding, rank)
            assert len({tensor.name for tensor in tensors}) == len(tensors)
            for tensor in tensors:
                rows = [part.shard.shape[0] for part in tensor.parts]
                assert [part.offset for part in tensor.parts] == [sum(rows[:i]) for i in range(len(rows))]
                assert all((sum(rows), *part.shard.shape[1:]) == tensor.shape for part in tensor.parts)
            held = sum(prod(shard.shape) for shard in shards(spec, sharding, rank))
            assert weight_bytes(spec, sharding, rank, "bfloat16") == 2 * held
            assert weight_bytes(spec, sharding, rank, "float32") == 4 * sum(tensor.size for tensor in tensors)


def test_one_rank_holds_every_parameter_once() -> None:
    for spec in AWKWARD.values():
        sharding = make_sharding(spec, Layout())
        assert weight_bytes(spec, sharding, 0, "float16") == 2 * parameter_count(spec)


def test_device_tensors_by_hand() -> None:
    spec = spec_of(
        layers=2, heads=6, kv_heads=2, head_dim=2, ffn=5, vocab=7, qkv_bias=True, tied_embeddings=True
    )
    sharding = make_sharding(spec, Layout.parse("P2T3"))
    last = {tensor.name: tensor for tensor in device_tensors(spec, sharding, 5)}
    assert list(last) == [
        "layers.1.input_norm.weight",
        "layers.1.qkv.weight",
        "layers.1.qkv.bias",
        "layers.1.o.weight",
        "layers.1.post_norm.weight",
        "layers.1.gate_up.weight",
        "layers.1.down.weight",
        "norm.weight",
        "head.weight",
    ]
    attention = "model.layers.1.self_attn"
    assert [(p.shard.parameter, p.shard.region, p.offset) for p in last["layers.1.qkv.weight"].parts] == [
        (f"{attention}.q_proj.weight", ((6, 12), (0, 6)), 0),
        (f"{attention}.k_proj.weight", ((2, 4), (0, 6)), 6),
        (f"{attention}.v_proj.weight", ((2, 4), (0, 6)), 8),
    ]
    assert last["layers.1.o.weight"].parts[0].shard.region == ((0, 6), (6, 12))
    assert last["layers.1.gate_up.weight"].shape == (2, 6)
    assert last["head.weight"].parts[0].shard == last["head.weight"].parts[0].shard
    assert last["head.weight"].parts[0].shard.parameter == EMBEDDING
    assert last["head.weight"].parts[0].shard.region == ((5, 7), (0, 6))
    first = [tensor.name for tensor in device_tensors(spec, sharding, 0)]
    assert first[0] == "embed.weight" and "head.weight" not in first
    both = [tensor.name for tensor in device_tensors(spec, make_sharding(spec, Layout()), 0)]
    assert "embed.weight" in both and "norm.weight" in both and "head.weight" not in both


def test_rank_view_names_the_right_neighbours() -> None:
    spec = spec_of(layers=3, heads=4, kv_heads=1)
    sharding = make_sharding(spec, Layout(2, 3, 2), ranks=(7, 3, 0, 9, 4, 1, 8, 2, 11, 5, 10, 6))
    view = rank_view(spec, sharding, 11)
    assert view.coordinate == Coordinate(1, 1, 0)
    assert view.tp_ranks == (11, 5)
    assert (view.previous_rank, view.next_rank) == (8, 10)
    assert view.first_stage_ranks == (8, 2)
    assert view.sampler_rank == 10
    assert (view.first_stage, view.last_stage) == (False, False)
    assert view.layers == range(1, 2)
    assert view.owns_kv and not rank_view(spec, sharding, 5).owns_kv
    ends = rank_view(spec, sharding, 7), rank_view(spec, sharding, 4)
    assert (ends[0].first_stage, ends[0].previous_rank) == (True, None)
    assert (ends[1].last_stage, ends[1].next_rank) == (True, None)


def test_stages_that_share_an_ffn_by_hand() -> None:
    spec = spec_of(layers=4, ffn=10, mlp_bias=True)
    sharding = make_sharding(spec, Layout.parse("P3T2"), carried=(0, 4, 0))
    assert sharding.stages == (range(2), range(2, 3), range(3, 4))
    first, second = (rank_view(spec, sharding, rank) for rank in (1, 3))
    assert first.last_ffn == range(3, 6) and first.carried == range(0) and first.ffn == range(5, 10)
    assert second.carried == range(8, 10) and second.last_ffn is None
    assert rank_view(spec, sharding, 5).carried == range(0), "what the second stage has is whole"
    held = [{t.name: t for t in device_tensors(spec, sharding, rank)} for rank in (1, 3)]
    of_shared = [{name for name in tensors if ".1." in name} for tensors in held]
    assert of_shared[1] == {
        f"layers.1.{name}" for name in ("post_norm.weight", "gate_up.weight", "gate_up.bias", "down.weight")
    }
    assert of_shared[0] > of_shared[1] and "layers.1.down.bias" in of_shared[0]
    assert held[1]["layers.1.gate_up.weight"].shape == (2 * 2, 6)
    assert held[1]["layers.1.down.weight"].parts[0].shard.region == ((0, 6), (8, 10))
    whole = make_sharding(spec, Layout.parse("P3T2"), carried=(0, 0, 0))
    assert whole == make_sharding(spec, Layout.parse("P3T2")), "nothing shared is said in one way"


@pytest.mark.parametrize("head_weight", [-0.9, -0.4, 0.0, 0.4, 1.0, 2.5, 3.0, 50.0])
@pytest.mark.parametrize("layers", [1, 2, 5, 9])
def test_stages_are_optimal(layers: int, head_weight: float) -> None:
    for pp in range(1, layers + 1):
        best = min(
            heaviest([b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True)], head_weight)
            for cuts in combinations(range(1, layers), pp - 1)
        )
        stages = split_stages(spec_of(layers=layers), pp, head_weight)
        assert [layer for stage in stages for layer in stage] == list(range(layers))
        assert len(stages) == pp and all(stages)
        assert heaviest([len(stage) for stage in stages], head_weight) == best


def heaviest(sizes: list[int], head_weight: float) -> float:
    return max(*sizes[:-1], sizes[-1] + head_weight) if len(sizes) > 1 else sizes[0] + head_weight


def test_stages_by_hand() -> None:
    assert split_stages(spec_of(layers=7), 3, 0.0) == (range(3), range(3, 5), range(5, 7))
    assert split_stages(spec_of(layers=32), 4, 4.0) == (range(9), range(9, 18), range(18, 27), range(27, 32))
    spec = spec_of()
    layer = sum(parameter.size for parameter in parameters(spec) if parameter.layer == 0)
    assert head_weight_in_layers(spec) == spec.vocab * spec.hidden / layer


@pytest.mark.parametrize(
    ("sizes", "layout", "words"),
    [
        ({"layers": 3}, "P4", ["P4", "4 pipeline stages", "has 3"]),
        ({"heads": 4, "kv_heads": 2}, "T5", ["T5", "5 tensor-parallel", "4 query heads"]),
        ({"heads": 6, "kv_heads": 2}, "T8", ["T8", "6 query heads"]),
        ({"heads": 5, "kv_heads": 5}, "T6", ["T6", "5 query heads"]),
        ({"heads": 6, "kv_heads": 3}, "D2P2T5", None),
        ({"heads": 3, "kv_heads": 3}, "T3", None),
        ({"ffn": 3}, "T4", ["4 tensor-parallel", "3 FFN columns"]),
        ({"vocab": 2}, "T3", ["3 tensor-parallel", "2 vocabulary rows"]),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    sizes: dict[str, int], layout: str, words: list[str] | None
) -> None:
    spec = spec_of(**sizes)
    if words is None:
        check_layout(spec, Layout.parse(layout))
        return
    with pytest.raises(LayoutError) as caught:
        check_layout(spec, Layout.parse(layout))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": (range(2), range(3, 5))}, r"\(0, 2\), \(3, 5\)"),
        ({"stages": (range(5), range(5, 5))}, "non-empty"),
        ({"stages": (range(2), range(2, 4))}, "5 layers"),
        ({"stages": (range(5),)}, "2 contiguous"),
        ({"ranks": (0, 0)}, "2 different ranks"),
        ({"ranks": (0, 1, 2)}, "2 different ranks"),
        ({"carried": (0,)}, "one number for each of 2 stages"),
        ({"carried": (3, 3)}, "0 for the first"),
        ({"carried": (0, 37)}, "37 of 37 FFN columns"),
        ({"carried": (0, -1)}, "-1 of 37 FFN columns"),
        (
            {"carried": (0, 3), "moe": MoESpec(experts=2, experts_per_token=1, expert_ffn=8, sparse=(2,))},
            "layer 2 is sparse",
        ),
        ({"head_weight": -1.0}, "-1.0"),
        ({"head_weight": float("nan")}, "nan"),
    ],
)
def test_bad_shardings_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        make_sharding(spec_of(), Layout.parse("P2"), **changes)  # type: ignore[arg-type]


def test_rank_outside_the_sharding_is_refused() -> None:
    with pytest.raises(LayoutError, match="rank 7"):
        rank_view(spec_of(), make_sharding(spec_of(), Layout.parse("P2")), 7)
    with pytest.raises(LayoutError, match="6 layers"):
        split_stages(spec_of(), 6, 0.0)


def test_sharding_is_free_of_torch() -> None:
    code = "import sys, seesaw.weights.sharding; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
