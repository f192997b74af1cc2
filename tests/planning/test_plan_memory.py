"""The memory of planned models: by hand, as the engine's arithmetic has it rank by rank, and estimated."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.errors import LayoutError, MemoryBudgetError
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.core.moe import MoESpec
from seesaw.planning.memory import MemoryBudget, MemoryPlan, TransitionMode, estimate_memory, plan_memory
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.shapes import PlannedModel, shape, stored_as
from seesaw.planning.shardings import sharding_for
from seesaw.weights.assignment import assign_ranks
from seesaw.weights.sharding import (
    Sharding,
    head_weight_in_layers,
    make_sharding,
    plan_peak_bytes,
    rank_view,
    weight_bytes,
)
from seesaw.weights.stages import prefill_head_weight
from tests.weights.shapes import AWKWARD, layouts, moes, spec_of, specs, usable

TINY = spec_of(layers=4, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=96, vocab=100, max_position=4096)
EXPERTS = MoESpec(experts=4, experts_per_token=2, expert_ffn=32, shared_ffn=16, sparse=(1, 3))


def limits(**changes: Any) -> Limits:
    settings: dict[str, Any] = {
        "device_memory": 1 << 20,
        "host_kv": 1 << 20,
        "chunk": 32,
        "max_running": 4,
    }
    return Limits(**(settings | changes))


@pytest.mark.parametrize(("bits", "weights"), [(8.0, 85888), (4.15625, 51940), (16.0, 156544)])
def test_experts_under_tensor_parallelism_by_hand(bits: float, weights: int) -> None:
    # A rank of T2 has, of every layer, QKV 64 x 64, O 64 x 32 and norms 2 x 64; of a dense one 3 x 48 x 64 for its
    # FFN; of a sparse one four experts of 3 x 16 x 64, 3 x 8 x 64 of the shared one, router 4 x 64 and gate 64.
    dense, sparse = 4096 + 2048 + 3 * 48 * 64, 4096 + 2048 + 4 * 3 * 16 * 64 + 3 * 8 * 64
    others = 2 * 128 + 2 * (128 + 256 + 64) + 2 * 50 * 64 + 64
    assert weights == 2 * (dense + sparse) * bits / 8 + 2 * others
    model = PlannedModel(name="tiny", spec=TINY, moe=EXPERTS, weight_bits=bits, kv_bits=8)
    memory = set_up(model, Plan.parse("T2"), "bfloat16", limits()).memory
    assert memory.weights == (weights, weights)
    # Hidden states of 4 x 64 and, widest in a sparse layer, two experts of 3 x 16 with a hidden state each, and the
    # shared one of 3 x 8; logits of 50 rows, on the rank that samples 2 x 100 more.
    activations = 32 * (4 * 64 + 2 * (3 * 16 + 64) + 3 * 8) * 2
    assert memory.workspace == (activations + 4 * 250 * 4, activations + 4 * 50 * 4)
    # Blocks of 16 tokens: K and V of 4 layers x 2 heads x 8, a byte each.
    blocks = ((1 << 20) - weights - memory.workspace[0]) // 2048
    assert memory.device_blocks == (blocks, blocks)
    assert memory.pool == (2048 * blocks, 2048 * blocks)
    assert memory.host_blocks == (1 << 20) // (2 * 2048)


def test_fp8_and_int4_transitions_by_hand() -> None:
    # From P2 to T2 of two equal layers, each rank keeps half of its own layer.
    spec = spec_of(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=16, vocab=32, max_position=64)
    matrices, norms, embedding = 4 * 8 * 8 + 3 * 8 * 16, 2 * 8, 32 * 8
    for bits in (8.0, 4.0):
        model = PlannedModel(name="two layers", spec=spec, weight_bits=bits)
        whole = partial(limits, stages=((1, 1), None))
        setup = set_up(model, Plan.parse("P2->T2"), "bfloat16", whole(transition="resident"))
        first = matrices * bits / 8 + 2 * (norms + embedding)
        decode = matrices * bits / 8 + 2 * (2 * norms + embedding + 8)
        # The norms of the layer, and the last one on the rank that has it, stay where they are.
        assert setup.memory.weights == (
            first + decode - 2 * norms,
            first + 2 * 8 + decode - 2 * norms - 2 * 8,
        )
        reload = set_up(model, Plan.parse("P2->T2"), "bfloat16", whole(transition="reload")).memory
        assert reload.weights == (max(first, decode), max(first + 2 * 8, decode))


# ---- against the engine's own arithmetic, one rank after the other ------------------------------------------------


def plan_slowly(
    spec: ModelSpec, shardings: tuple[Sharding, Sharding], dtype: str, budget: MemoryBudget
) -> MemoryPlan | None:
    """A dense model in one type, by walking over the device tensors of every rank; None if it does not fit."""
    modes: list[TransitionMode] = (
        ["resident", "delta", "reload"] if shardings[0] != shardings[1] else ["resident"]
    )
    plans = [
        _slow(spec, shardings, dtype, budget, mode) for mode in ([budget.mode] if budget.mode else modes)
    ]
    fitting = [plan for plan in plans if plan]
    most = max((min(plan.device_blocks) for plan in fitting), default=0)
    return next((plan for plan in fitting if min(plan.device_blocks) >= 0.8 * most), None)


def _slow(
    spec: ModelSpec,
    shardings: tuple[Sharding, Sharding],
    dtype: str,
    budget: MemoryBudget,
    mode: TransitionMode,
) -> MemoryPlan | None:
    first, second = shardings
    size, ranks = DTYPE_BYTES[dtype], range(first.layout.world)
    views = [[rank_view(spec, sharding, rank) for sharding in shardings] for rank in ranks]
    block = [
        [2 * len(v.layers) * len(v.kv_heads) * spec.head_dim * budget.block_size * size for v in pair]
        for pair in views
    ]
    weights, parts = [], []
    for rank in ranks:
        peaks = [weight_bytes(spec, first, rank, dtype)]
        if first != second:
            peaks += [
                plan_peak_bytes(spec, a, b, mode=mode, dtype=dtype, rank=rank)
                for a, b in itertools.permutations(shardings)
            ]
        weights.append(max(peaks))
        needs = []
        for v in views[rank]:
            heads = (len(v.q_heads) + 2 * len(v.kv_heads)) * spec.head_dim
            width = 4 * spec.hidden + max(3 * heads, 3 * len(v.ffn))
            columns = len(v.vocab) + (2 * spec.vocab if rank == v.sampler_rank else 0) if v.last_stage else 0
            tokens = max(budget.max_batch_tokens, budget.max_running)
            needs.append((tokens * width * size, budget.max_running * columns * 4))
        activations, logits = max(needs, key=sum)
        parts.append((("activations", activations), *((("logits", logits),) if logits else ())))
    workspace = [sum(bytes for _, bytes in of_rank) for of_rank in parts]
    blocks = [
        min((budget.device - weights[rank] - workspace[rank]) // block[rank][phase] for rank in ranks)
        for phase in (0, 1)
    ]
    host = budget.host_kv // (spec.kv_bytes_per_token(dtype) * budget.block_size)
    longest = min(
        spec.max_position, budget.block_size * min([*blocks, host] if budget.two_phases else blocks)
    )
    if min(blocks) < 1 or longest < 2:
        return None
    enough = -(-longest // budget.block_size) * budget.max_running
    capped = min(blocks[0], enough), min(blocks[1], enough)
    return MemoryPlan(
        mode=mode,
        weights=tuple(weights),
        workspace=tuple(workspace),
        pool=tuple(max(n * b for n, b in zip(capped, block[rank], strict=True)) for rank in ranks),
        device_blocks=capped,
        host_blocks=host,
        max_model_len=longest,
        parts=tuple(parts),
    )


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(AWKWARD)), data=st.data())
def test_dense_models_of_one_type_have_the_engines_own_memory(name: str, data: st.DataObject) -> None:
    types: list[DType] = ["bfloat16", "float32"]
    spec, dtype = AWKWARD[name], data.draw(st.sampled_from(types))
    world = data.draw(st.integers(1, 6))
    prefill, decode = (data.draw(st.sampled_from(usable(spec, world))) for _ in range(2))
    begin, step = prefill_head_weight(spec), head_weight_in_layers(spec)
    if prefill == decode:
        phases = 1 / (spec.layers + begin), 1 / (spec.layers + step)
        head = (begin * phases[0] + step * phases[1]) / sum(phases)
        shardings = (make_sharding(spec, prefill, head_weight=head),) * 2
    else:
        first = sharding_for(stored_as(spec, dtype, name), prefill, "prefill")
        shardings = first, assign_ranks(spec, first, make_sharding(spec, decode, head_weight=step))
    asked = limits(
        device_memory=data.draw(st.integers(10_000, 200_000)),
        host_kv=data.draw(st.sampled_from([1000, 100_000])),
        transition=data.draw(st.sampled_from([None, "resident", "delta", "reload"])),
    )
    setup_budget = asked.budget(prefill, separate=True)
    expected = plan_slowly(spec, shardings, dtype, setup_budget)
    model = stored_as(spec, dtype, name)
    plan = Plan(prefill, decode, separate=True)
    if expected is None:
        with pytest.raises(MemoryBudgetError, match=r"rank \d needs"):
            set_up(model, plan, dtype, asked)
        return
    setup = set_up(model, plan, dtype, asked)
    assert setup.shardings == shardings
    assert setup.memory == expected == plan_memory(model, shardings, dtype, setup_budget)


# ---- properties --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_more_ranks_of_a_stage_never_leave_fewer_blocks(spec: ModelSpec, data: st.DataObject) -> None:
    moe = data.draw(st.none() | moes(spec))
    model = PlannedModel(name="random", spec=spec, moe=moe, weight_bits=4.15625, kv_bits=8)
    pp = data.draw(st.integers(1, spec.layers))
    blocks = []
    for tp in range(1, 9):
        layout = Layout(pp=pp, tp=tp)
        if layout in usable(spec, layout.world, moe):
            budget = limits(max_model_len=None).budget(layout, separate=False)
            found = estimate_memory(model, layout, layout, "bfloat16", budget)
            assert not isinstance(found, str)
            blocks.append(found[1])
    assert blocks == sorted(blocks)


@pytest.mark.parametrize(
    ("name", "weights"), [("Llama-2-70B", None), ("Qwen3-30B-A3B", None), ("Mixtral-8x7B", "int4")]
)
@pytest.mark.parametrize("gib", [8, 20, 60])
def test_estimates_are_exact_on_small_nodes(name: str, weights: str | None, gib: int) -> None:
    model, asked = shape(name, weights=weights), limits(device_memory=gib << 30, host_kv=64 << 30, chunk=512)
    for prefill, decode in itertools.product(layouts(4), repeat=2):
        budget = asked.budget(prefill, separate=prefill != decode)
        found = estimate_memory(model, prefill, decode, "bfloat16", budget)
        try:
            memory = set_up(
                model, Plan(prefill, decode, separate=prefill != decode), "bfloat16", asked
            ).memory
        except MemoryBudgetError as refusal:
            assert found == str(refusal).replace(f"rank {rank_of(refusal)} ", f"rank {rank_of(found)} ")
        else:
            assert found == memory.device_blocks


def rank_of(text: object) -> str:
    return str(text).partition("rank ")[2].partition(" ")[0]


@pytest.mark.parametrize(
    ("name", "ranks", "gib"),
    [
        ("Llama-3.1-405B", 16, 76),
        ("Llama-3.1-405B", 32, 45),
        ("Qwen3-235B-A22B", 16, 45),
        ("Llama-3-8B", 32, 22),
    ],
)
def test_estimates_are_never_optimistic_on_large_ones(name: str, ranks: int, gib: int) -> None:
    model = shape(name)
    asked = limits(
        device_memory=gib << 30, host_kv=256 << 30, chunk=None, max_model_len=4096, max_running=512
    )
    shares = []
    for prefill, decode in list(itertools.product(layouts(ranks), repeat=2))[::3]:
        try:
            budget = asked.budget(prefill, separate=prefill != decode)
            found = estimate_memory(model, prefill, decode, "bfloat16", budget)
            memory = set_up(model, Plan(prefill, decode, separate=True), "bfloat16", asked).memory
        except LayoutError:
            continue
        except MemoryBudgetError:
            assert isinstance(found, str)
            continue
        assert not isinstance(found, str), "refused what fits"
        assert all(a <= b for a, b in zip(found, memory.device_blocks, strict=True))
        shares.append(min(a / b for a, b in zip(found, memory.device_blocks, strict=True)))
    assert min(shares) > 0.75 and sorted(shares)[len(shares) // 2] > 0.97
