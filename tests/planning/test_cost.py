"""The cost of Forwards, against arithmetic by hand and against what physics demands."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import Curve, TypeCurves
from seesaw.core.layout import Layout
from seesaw.core.moe import MoESpec
from seesaw.planning.cost import Cost, LayoutCost, Work
from tests.planning.machines import FLAT, hardware, line, model

LAYER = 1024 * 2048 + 1024 * 1024 + 3 * 1024 * 2816  # elements of a layer's matrices
HEAD = 1024 * 32000


def cost(layout: str, stages: list[int], **changes: object) -> LayoutCost:
    return LayoutCost(model(), hardware(**changes), Layout.parse(layout), stages)


def test_one_row_streams_the_weights() -> None:
    found = cost("T1", [8]).stage(0, Work(tokens=1, sampled=1, keys=100.0))
    assert found.weights == pytest.approx((8 * LAYER + HEAD) * 2 / 1e10)
    assert found.arithmetic == found.all_reduce == 0.0
    assert found.attention == pytest.approx(8 * 2 * 8 * 64 * 2 * 100 / 1e10)


def test_many_rows_are_bound_by_arithmetic() -> None:
    work = Work(tokens=4096, sampled=4096, pairs=1e6)
    found = cost("T1", [8]).stage(0, work)
    assert found.arithmetic == pytest.approx(2 * 4096 * (8 * LAYER + HEAD) / 1e12)
    assert found.attention == pytest.approx(8 * 4 * 16 * 64 * 1e6 / 1e12)
    assert found.weights == 0.0


def test_the_last_layer_and_the_head_run_on_sampled_rows() -> None:
    few, all_rows = (
        cost("T1", [8]).stage(0, Work(tokens=4096, sampled=sampled)).arithmetic for sampled in (256, 4096)
    )
    kept = 1024 * 1024  # K and V
    assert all_rows - few == pytest.approx(2 * (4096 - 256) * (LAYER - kept + HEAD) / 1e12)


def test_tensor_parallel_ranks_share_products_and_pay_for_sums() -> None:
    alone = cost("T1", [8]).stage(0, Work(tokens=4096, sampled=4096))
    shared = cost("T4", [8]).stage(0, Work(tokens=4096, sampled=4096))
    assert shared.arithmetic == pytest.approx(alone.arithmetic / 4)
    each = line(1e-5, 1e9 / 4)(4096 * 1024 * 2)
    assert shared.all_reduce == pytest.approx((2 * 8 + 1) * each)
    assert alone.all_reduce == 0.0


def test_sums_that_travel_in_parts_hide_behind_their_products() -> None:
    work = Work(tokens=4096, sampled=4096)
    layer = line(1e-5, 1e9 / 4)(4096 * 1024 * 2)
    products = [2 * 4096 * 1024 * depth / 4 / 1e12 for depth in (1024, 2816)]
    found = cost("T4", [8], partial_sums=True).stage(0, work)
    beyond = sum(layer - 3 / 4 * min(layer, product) for product in products)
    assert found.all_reduce == pytest.approx(8 * beyond + layer)  # the embedding has no product
    assert found.arithmetic == cost("T4", [8]).stage(0, work).arithmetic
    few = Work(tokens=8, sampled=8)  # too small to travel in parts
    assert cost("T4", [8], partial_sums=True).stage(0, few) == cost("T4", [8]).stage(0, few)


def test_stages_share_layers() -> None:
    work = Work(tokens=4096, sampled=4096, keys=50.0)
    split = cost("P2", [5, 3])
    whole = cost("T1", [8]).stage(0, work)
    assert (split.stage(0, work) + split.stage(1, work)).seconds == pytest.approx(whole.seconds)
    assert split.hand_over(4096) == pytest.approx(line(1e-5, 1e9)(4096 * 1024 * 2))


def test_stages_share_an_ffn() -> None:
    work = Work(tokens=4096, sampled=16, pairs=1e6)
    whole, shared = (
        LayoutCost(model(), hardware(), Layout.parse("P2"), [5, 3], carried=carried)
        for carried in ((), (0.0, 0.25))
    )
    moved = 0.25 * 3 * 2816 * 1024
    first, second = (whole.stage(i, work).arithmetic - shared.stage(i, work).arithmetic for i in (0, 1))
    assert first == pytest.approx(2 * 4096 * moved / 1e12) and second == pytest.approx(-first)
    assert whole.stage(0, work).attention == shared.stage(0, work).attention
    assert shared.hand_over(64) == pytest.approx(line(1e-5, 1e9)(64 * 1024 * 4)), "twice as much"
    three = LayoutCost(model(), hardware(), Layout.parse("P3"), [3, 3, 2], carried=(0.0, 0.25, 0.0))
    mean = (line(1e-5, 1e9)(64 * 1024 * 4) + line(1e-5, 1e9)(64 * 1024 * 2)) / 2
    assert three.hand_over(64) == pytest.approx(mean)
    assert whole.kind(0) != shared.kind(0) and whole.kind(1) != shared.kind(1)


def test_both_stages_that_share_an_ffn_sum_it_over_their_ranks() -> None:
    work = Work(tokens=4096, sampled=16)
    costs = [
        LayoutCost(model(), hardware(), Layout.parse("P2T2"), [5, 3], carried=carried)
        for carried in ((), (0.0, 0.25))
    ]
    whole, shared = ([cost.stage(i, work).all_reduce for i in (0, 1)] for cost in costs)
    each = line(1e-5, 1e9 / 2)(4096 * 1024 * 2)
    assert shared[0] == pytest.approx(whole[0]) and shared[1] == pytest.approx(whole[1] + each)


def test_kv_heads_are_replicated_where_there_are_more_ranks() -> None:
    work = Work(tokens=8, sampled=8, keys=1e5)
    spec = {"kv_heads": 2}
    layouts = [LayoutCost(model(**spec), hardware(), Layout.parse(t), [8]) for t in ("T1", "T2", "T4")]
    one, two, four = (layout.stage(0, work).attention for layout in layouts)
    assert two == pytest.approx(one / 2) and four == pytest.approx(two)


def test_attention_goes_by_the_work_of_one_rank() -> None:
    flops, moved = 4 * 16 * 64 * 1e6, 2 * 8 * 64 * 2 * 1e5  # of a whole layer
    curves = {
        "prefill_attention": Curve((flops / 4, flops), (0.25, 0.5)),
        "decode_attention": Curve((moved / 4, moved), (0.2, 0.8)),
    }
    for layout, ranks, prefill, decode in (("T1", 1, 0.5, 0.8), ("T4", 4, 0.25, 0.2)):
        found = cost(layout, [8], **curves)
        prompts = found.stage(0, Work(tokens=4096, sampled=4096, pairs=1e6)).attention
        steps = found.stage(0, Work(tokens=64, sampled=64, keys=1e5)).attention
        assert prompts == pytest.approx(8 * flops / ranks / (1e12 * prefill))
        assert steps == pytest.approx(8 * moved / ranks / (1e10 * decode))
    halved = LayoutCost(replace(model(), kv_bits=8), hardware(**curves), Layout(), [8])
    share = curves["decode_attention"](moved / 2)
    assert halved.stage(0, Work(tokens=64, sampled=64, keys=1e5)).attention == pytest.approx(
        8 * moved / 2 / (1e10 * share)
    )


RISING = Curve((64.0, 1024.0), (0.25, 1.0), extends=True)
CHUNK = Work(tokens=512, sampled=0, pairs=1e5)


def test_a_chunk_that_ends_no_prompt_pays_for_nothing_sampled() -> None:
    curves = {"product": RISING, "prefill_attention": RISING, "decode_attention": RISING}
    found = cost("P2T4", [4, 4], operator_overhead=1e-6, **curves)
    chunk = found.stage(1, CHUNK)
    layer, keys_values = LAYER / 4, 1024 * 1024 / 4
    assert chunk.weights + chunk.arithmetic == pytest.approx(
        2 * 512 * (3 * layer + keys_values) / (1e12 * RISING(512))
    )
    assert chunk.all_reduce == pytest.approx(2 * 3 * line(1e-5, 1e9 / 4)(512 * 1024 * 2))
    assert chunk.overhead == pytest.approx(1e-6 * (3 * (4 + 5) + 1 + 3))
    flops = 4 * 4 * 64 * 1e5
    assert chunk.attention == pytest.approx(3 * (1e-6 + flops / (1e12 * RISING(flops))))
    assert chunk.seconds < found.stage(1, msgspec.structs.replace(CHUNK, sampled=1)).seconds
    assert found.stage(0, CHUNK) == found.stage(0, msgspec.structs.replace(CHUNK, sampled=1))


def test_a_chunk_that_samples_nothing_touches_no_expert_of_the_last_layer() -> None:
    moe = MoESpec(experts=64, experts_per_token=4, expert_ffn=512, sparse=tuple(range(8)))
    sparse = LayoutCost(replace(model(), moe=moe), hardware(product=RISING), Layout(), [8])
    found, layer = sparse.stage(0, CHUNK), sparse._layer(512, 512)
    kept = 2 * 512 * 1024 * 1024 / (1e12 * RISING(512))
    assert found.weights + found.arithmetic == pytest.approx(7 * (layer.weights + layer.arithmetic) + kept)


def test_overheads_are_counted_by_operator_and_step() -> None:
    free = cost("T1", [8]).stage(0, Work(tokens=1, sampled=1))
    taxed = cost("T1", [8], operator_overhead=1e-6, step_overhead=1e-3).stage(0, Work(tokens=1, sampled=1))
    assert free.overhead == 0.0
    assert taxed.overhead == pytest.approx(1e-3 + 1e-6 * (8 * (4 + 5) + 1))
    assert taxed.attention == pytest.approx(free.attention + 8e-6)


def test_quantised_layers_stream_faster_but_not_the_head() -> None:
    quantised = replace(model(), weight_bits=4.16)
    found = LayoutCost(quantised, hardware(), Layout(), [8]).stage(0, Work(tokens=1, sampled=1))
    assert found.weights == pytest.approx((8 * LAYER * 4.16 / 8 + HEAD * 2) / 1e10)


def test_experts_are_read_as_far_as_tokens_touch_them() -> None:
    moe = MoESpec(experts=64, experts_per_token=4, expert_ffn=512, sparse=tuple(range(8)))
    sparse = LayoutCost(replace(model(), moe=moe), hardware(), Layout(), [8])
    expert, attention, router = 3 * 1024 * 512, 1024 * 2048 + 1024 * 1024, 1024 * 64
    one = sparse.stage(0, Work(tokens=1, sampled=1))
    assert one.weights == pytest.approx((8 * (attention + router + 4 * expert) + HEAD) * 2 / 1e10)
    many = sparse.stage(0, Work(tokens=1 << 16, sampled=1 << 16))
    flops = 2 * (1 << 16) * (8 * (attention + router + 4 * expert) + HEAD)
    assert many.arithmetic == pytest.approx(flops / 1e12)


@pytest.mark.parametrize(
    "work", [Work(tokens=16, sampled=16, keys=1e4), Work(tokens=900, sampled=2, pairs=1e5)]
)
def test_better_hardware_is_never_slower(work: Work) -> None:
    base = cost("P2T2", [4, 4])
    better = [
        cost("P2T2", [4, 4], bandwidth=2e10),
        cost("P2T2", [4, 4], flops={"bfloat16": 2e12}),
        cost("P2T2", [4, 4], all_reduce={2: line(1e-6, 1e9)}),
    ]
    for other in better:
        assert all(other.stage(s, work).seconds <= base.stage(s, work).seconds for s in (0, 1))
    assert sum(other.stage(0, work).seconds < base.stage(0, work).seconds for other in better) >= 2


def test_costs_add_up() -> None:
    one = Cost(weights=1.0, attention=2.0, overhead=0.5)
    assert (one + one).seconds == one.times(2.0).seconds == 7.0


def test_a_last_layer_asks_only_where_something_is_sampled() -> None:
    work = Work(tokens=1024, sampled=4, pairs=4 * 256 * 257 / 2)
    one, eight = cost("T1", [1]).stage(0, work), cost("T1", [8]).stage(0, work)
    whole = 4 * 16 * 64 * work.pairs / 1e12
    assert one.attention == pytest.approx(2 * 8 * 64 * 1024 * 2 / 1e10)  # keys of four prompts are read
    assert eight.attention == pytest.approx(7 * whole + one.attention)


def test_figures_of_the_type_come_before_the_common_ones() -> None:
    own = TypeCurves(
        product=Curve((1.0,), (0.5,)),
        prefill_attention=FLAT,
        decode_attention=FLAT,
        token_of_query=1e-9,
        token_of_kv=2e-9,
    )
    common, typed = cost("T2", [8]), cost("T2", [8], by_type={"bfloat16": own})
    work = Work(tokens=1024, sampled=1024, pairs=1e5)
    assert typed.stage(0, work).arithmetic == pytest.approx(2 * common.stage(0, work).arithmetic)
    extra = typed.stage(0, work).attention - common.stage(0, work).attention
    assert extra == pytest.approx(8 * 1024 * 64 * (8 * 1e-9 + 4 * 2e-9))


def test_a_curve_measured_where_memory_bounds_still_counts_as_weights() -> None:
    slow = cost("T1", [8], product=Curve((1.0, 64.0, 1024.0), (0.001, 0.5, 1.0)))
    step = slow.stage(0, Work(tokens=1, sampled=1))
    assert step.arithmetic == 0.0
    assert step.weights == pytest.approx(2 * (8 * LAYER + HEAD) / (1e12 * 0.001))


def test_layers_and_activations_have_figures_of_their_own() -> None:
    work = Work(tokens=8, sampled=8)
    plain = cost("P2", [4, 4]).stage(0, work)
    taxed = cost("P2", [4, 4], layer_overhead=1e-4, activation_bandwidth=2.5e9).stage(0, work)
    assert taxed.overhead == pytest.approx(4e-4)
    assert taxed.activations == pytest.approx(4 * plain.activations)


def test_a_type_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no figures for float16.*--dtype float16"):
        LayoutCost(model(), hardware(), Layout(), [8], "float16")
