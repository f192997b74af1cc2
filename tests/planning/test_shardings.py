"""Stages of both phases: by arithmetic, by bytes, or as given."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Layout, Plan
from seesaw.core.moe import MoESpec
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.shapes import PlannedModel, shape
from seesaw.planning.shardings import Role, footprint, plan_shardings, sharding_for
from seesaw.weights.sharding import Sharding, make_sharding
from seesaw.weights.stages import head_weight_in_layers, prefill_head_weight
from tests.planning.machines import model
from tests.weights.shapes import spec_of

_USED: dict[str, Role] = {"P4": "both", "P4->P4": "both", "P4->P2T2": "prefill", "P2T2->P4": "decode"}


def sizes(planned: PlannedModel, layout: str, role: Role = "decode") -> list[int]:
    sharding = sharding_for(planned, Layout.parse(layout), role)
    return [len(stage) for stage in sharding.stages]


@pytest.mark.parametrize("name", ["Llama-3-8B", "Llama-2-70B", "Llama-3.1-405B", "Qwen3-4B"])
@pytest.mark.parametrize("layout", ["P2", "P4", "P8T2", "P16"])
def test_dense_models_of_one_type_are_divided_as_the_engine_does(name: str, layout: str) -> None:
    planned, wanted = shape(name), Layout.parse(layout)
    head = head_weight_in_layers(planned.spec)
    assert sharding_for(planned, wanted, "decode") == make_sharding(planned.spec, wanted, head_weight=head)
    head = prefill_head_weight(planned.spec)
    whole = make_sharding(planned.spec, wanted, head_weight=head)
    found = sharding_for(planned, wanted, "prefill")
    assert found == whole or heaviest(planned, whole) > 1.03 * heaviest(planned, found)
    fullest, was = (max(footprint(planned).held(sharding)) for sharding in (found, whole))
    assert fullest <= 1.051 * was, "an even prefill is not worth any memory"


def heaviest(planned: PlannedModel, sharding: Sharding) -> float:
    """Parameters that a token of a prompt passes on the heaviest stage."""
    layer, column = planned.touched_in_layer(0, 1), 3 * planned.spec.hidden
    loads = [layer * len(stage) for stage in sharding.stages]
    loads[-1] += layer * prefill_head_weight(planned.spec)
    for stage, columns in enumerate(sharding.carried):
        loads[stage] += column * columns
        loads[stage - 1] -= column * columns
    return max(loads)


def test_an_ffn_is_shared_where_whole_layers_leave_stages_of_prefill_uneven() -> None:
    # 22 layers whose last one keeps little of its work are 21.02 in four stages: 5.26 each, or 6 of whole ones.
    spec = spec_of(layers=22, hidden=2048, heads=32, kv_heads=4, head_dim=64, ffn=5632, vocab=32000)
    planned, layout = PlannedModel(name="1.1B", spec=spec), Layout.parse("P4")
    layer = planned.touched_in_layer(0, 1)
    found = sharding_for(planned, layout, "prefill")
    assert heaviest(planned, found) / layer == pytest.approx(5.268, abs=1e-3)
    assert [len(stage) for stage in found.stages] == [6, 5, 5, 6]
    assert found.carried == (0, 5376, 3456, 1536), "in steps of 128"
    assert not sharding_for(planned, layout, "decode").carried
    assert not sharding_for(planned, layout, "both").carried
    # 32 layers on eight stages would be 3.88 each; 4 are near enough.
    assert not sharding_for(shape("Llama-3-8B"), Layout.parse("P8"), "prefill").carried
    # On two ranks a stage, both have whole steps of either part.
    wide = sharding_for(planned, Layout.parse("P4T2"), "prefill").carried
    assert any(wide) and all(columns % 256 == 0 for columns in wide)


def test_no_sparse_ffn_is_shared() -> None:
    spec = spec_of(layers=6, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=64, vocab=8)
    dense = PlannedModel(name="dense", spec=spec)
    assert sharding_for(dense, Layout.parse("P4"), "prefill").carried
    moe = MoESpec(experts=4, experts_per_token=1, expert_ffn=64, sparse=tuple(range(6)))
    assert not sharding_for(replace(dense, moe=moe), Layout.parse("P4"), "prefill").carried
    some = sharding_for(replace(dense, moe=replace(moe, sparse=(1, 3, 5))), Layout.parse("P4"), "prefill")
    assert any(some.carried)
    assert not any(stage.start % 2 == 0 for stage, n in zip(some.stages, some.carried, strict=True) if n)


def test_a_head_of_16_bits_weighs_more_beside_layers_of_4() -> None:
    # 128256 x 4096 against 218.1 million of a layer: 2.4 layers, or 9.3 where these have 4.16 bits.
    assert sizes(shape("Llama-3-8B"), "P4") == [9, 9, 8, 6]
    assert sizes(shape("Llama-3-8B", weights="int4"), "P4") == [11, 10, 10, 1]
    assert sizes(shape("Llama-3-8B", weights="int4"), "P4", "prefill") == sizes(
        shape("Llama-3-8B"), "P4", "prefill"
    )


def test_sparse_layers_weigh_all_experts_in_decode_and_those_a_token_passes_in_prefill() -> None:
    # Attention has 4 x 8 x 8 elements and the dense FFN 3 x 8 x 64: a token passes as much of two experts of 32
    # columns, but sixteen of them are read.
    spec = spec_of(layers=6, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=64, vocab=8)
    moe = MoESpec(experts=16, experts_per_token=2, expert_ffn=32, sparse=(3, 4, 5))
    planned = PlannedModel(name="half sparse", spec=spec, moe=moe)
    assert sizes(planned, "P3") == [4, 1, 1]
    assert sizes(planned, "P3", "prefill") == [2, 2, 2]


def test_a_plan_that_never_reshards_is_divided_for_both_phases() -> None:
    # To Qwen3-4B's 36 layers the head adds 3.9 in decode; in prefill the end of the model takes most of one off.
    planned = shape("Qwen3-4B")
    assert sizes(planned, "P4", "prefill") == [9, 9, 9, 9]
    assert sizes(planned, "P4", "decode") == [10, 10, 10, 6]
    assert sizes(planned, "P4", "both") == [10, 9, 9, 8]
    for plan, used in _USED.items():
        shardings = plan_shardings(planned, Plan.parse(plan))
        stages = next(sharding.stages for sharding in shardings if sharding.layout.pp == 4)
        assert [len(stage) for stage in stages] == sizes(planned, "P4", used)


def test_both_phases_count_the_same_however_their_weights_are_measured() -> None:
    # Decode reads 64 experts of a sparse layer and prefill passes two: shares of a phase are added, not weights.
    spec = spec_of(layers=8, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=64, vocab=8)
    moe = MoESpec(experts=64, experts_per_token=2, expert_ffn=32, sparse=(4, 5, 6, 7))
    full = PlannedModel(name="half sparse", spec=spec, moe=moe)
    assert sizes(full, "P3", "prefill") == [3, 2, 3]
    assert sizes(full, "P3", "decode") == [5, 2, 1]
    assert sizes(full, "P3", "both") == [4, 2, 2]
    assert sizes(replace(full, weight_bits=8), "P3", "both") == [4, 2, 2]


def test_stages_may_be_given() -> None:
    plan, given = Plan.parse("P4->P2T2"), ((1, 2, 2, 3), (5, 3))
    setup = set_up(model(), plan, "bfloat16", Limits(device_memory=1 << 30, host_kv=64 << 20, stages=given))
    assert tuple(tuple(map(len, sharding.stages)) for sharding in setup.shardings) == given
    both = plan_shardings(model(), Plan.parse("P2->P2"), ((3, 5), (3, 5)))
    assert both[0] == both[1] and tuple(map(len, both[0].stages)) == (3, 5)


@pytest.mark.parametrize(
    ("plan", "stages", "said"),
    [
        ("P4->T4", ((1, 2, 2, 2), (8,)), r"layout P4: stages \(1, 2, 2, 2\) do not divide 8 layers into 4"),
        ("P4->T4", ((4, 4), (8,)), r"stages \(4, 4\)"),
        ("P4->T4", ((2, 2, 2, 2), (4, 4)), r"layout T4: stages \(4, 4\)"),
        ("P2->P2", ((8, 0), (8, 0)), "at least one"),
        ("P2->P2", ((3, 5), (5, 3)), r"plan P2->P2: stages \(3, 5\) and \(5, 3\)"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    plan: str, stages: tuple[tuple[int, ...], tuple[int, ...]], said: str
) -> None:
    with pytest.raises(LayoutError, match=said):
        plan_shardings(model(), Plan.parse(plan), stages)


def test_experts_are_not_divided_beyond_their_columns() -> None:
    moe = MoESpec(experts=4, experts_per_token=1, expert_ffn=6, shared_ffn=4, sparse=(0,))
    planned = replace(model(), moe=moe)
    with pytest.raises(LayoutError, match="8 tensor-parallel ranks cannot share 6 columns of an expert"):
        plan_shardings(planned, Plan.parse("T8"))
    planned = replace(model(), moe=replace(moe, expert_ffn=64))
    with pytest.raises(
        LayoutError, match="8 tensor-parallel ranks cannot share 4 columns of the shared expert"
    ):
        plan_shardings(planned, Plan.parse("T8"))


def test_setting_up_needs_neither_torch_nor_scipy() -> None:
    code = (
        "import sys\n"
        "from seesaw.core.layout import Plan\n"
        "from seesaw.planning.setup import Limits, set_up\n"
        "from seesaw.planning.shapes import shape\n"
        "limits = Limits(device_memory=1 << 35, host_kv=1 << 32)\n"
        "set_up(shape('Llama-3-8B'), Plan.parse('P4->T4'), 'bfloat16', limits)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
