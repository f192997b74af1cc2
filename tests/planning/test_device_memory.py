"""The memory of plans on CUDA devices: by hand, for known models on known cards, and what holds for all of them."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import ModelSpec
from seesaw.core.workspace import graph_batches, logit_rows
from seesaw.planning.books import Books
from seesaw.planning.demand import MODES, demands
from seesaw.planning.device_costs import CUDA, HOST, DeviceCosts, costs_of
from seesaw.planning.memory import MemoryPlan, plan_memory
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import PlannedModel, shape, stored_as
from seesaw.planning.shardings import plan_shardings
from seesaw.weights.changes import Mode
from seesaw.weights.sharding import plan_peak_bytes, rank_view, weight_bytes
from tests.weights.shapes import specs, usable

GIB, MIB = 1 << 30, 1 << 20
MODELS = {"8B": "Llama-3.1-8B", "34B": "CodeLlama-34B", "70B": "Llama-3.1-70B"}
LENGTH = 4096
ALWAYS = frozenset(
    "activations context libraries graphs attention inputs sampling staging allocator KV_pool weights".split()
)
"""On every rank; collectives and logits on some."""


@lru_cache(maxsize=8)
def model(name: str) -> PlannedModel:
    return shape(name)


def limits(gib: float, **changes: Any) -> Limits:
    """Batches of 2,048 tokens and 256 sequences of up to 4,096 tokens."""
    given: dict[str, Any] = {
        "device_memory": int(gib * GIB),
        "host_kv": 64 * GIB,
        "chunk": 2048,
        "max_running": 256,
        "max_model_len": LENGTH,
        "costs": CUDA,
    }
    return Limits(**(given | changes))


def set_up_on(name: str, plan: str, gib: float, **changes: Any) -> Setup:
    return set_up(model(name), Plan.parse(plan), "bfloat16", limits(gib, **changes))


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_every_part_of_an_8b_model_on_one_card_by_hand() -> None:
    memory = set_up_on(MODELS["8B"], "T1", 24).memory
    # A token takes 4 x 4096 + 3 x 14336 = 59,392 elements of two bytes where it is widest.
    width = 2 * 59_392
    assert dict(memory.components(0)) == {
        "weights": 2 * 8_030_261_248,
        "activations": 2048 * width,  # 232 MiB
        # 256 rows are fewer than the 348 that 512 MiB hold: three times 128,256 float32
        "logits": 256 * 3 * 128_256 * 4,  # 375.75 MiB
        "context": 512 * MIB,
        "libraries": 4 * 32 * MIB,
        # 23 batch sizes from 1 to 256: a page of 2 MiB and 32 layers of 128 KiB each; activations of 256 tokens
        "graphs": 23 * 6 * MIB + 256 * width,  # 167 MiB
        # partial results, (256 + 1024) x 32 heads x 130 x 4 bytes = 20 MiB, are less than FlashInfer's workspace
        "attention": 136 * MIB,
        "inputs": 2048 * 80 + 256 * (LENGTH // 16) * 8,
        "sampling": 64 * MIB,
        "staging": 64 * MIB,
        # tails of three pools; 12 tensors for each of 32 layers, of both phases
        "allocator": 3 * 22 * MIB + 12 * 64 * 512,
        "KV pool": 3756 * 2 * MIB,
    }


@pytest.mark.parametrize(
    ("plan", "communicators", "connections"),
    [
        ("T1", 0, 0),
        ("D4", 0, 0),
        # that of all ranks; 8 channels, for the ring and one neighbour of a chain of two, 2 to gather
        ("T2", 1, 8 * 2 + 2 * 1),
        # and that of the group
        ("D2T2", 2, 8 * 2 + 2 * 1),
        # the ring and two neighbours
        ("T4", 1, 8 * 3 + 2 * 3),
        ("T8", 1, 8 * 3 + 2 * 7),
        ("D4->T4", 1, 8 * 3 + 2 * 3),
        ("T4->T4", 1, 8 * 3 + 2 * 3),
        # two lanes, one of which has the communicator of all; two channels to the next stage, and from the last
        ("P2", 2, 2 * 2),
        # four lanes at most; two neighbours, or one and the far end
        ("P4", 4, 2 * 2),
        ("P4->T4", 4, 8 * 3 + 2 * 3 + 2 * 2),
        # groups of both layouts and six lanes; tokens for two ranks, and for four
        ("P4T2->P2T4", 2 + 6, (8 * 2 + 2 * 1) + (8 * 3 + 2 * 3) + 2 * (1 + 2) + 2 * (1 + 4)),
        ("D2T2->T4", 2, (8 * 2 + 2 * 1) + (8 * 3 + 2 * 3)),
    ],
)
def test_communicators_follow_from_both_layouts(plan: str, communicators: int, connections: int) -> None:
    memory = set_up_on(MODELS["8B"], plan, 80).memory
    for rank in range(Plan.parse(plan).world):
        found = dict(memory.components(rank)).get("collectives", 0)
        assert found == communicators * 24 * MIB + connections * 12 * MIB


def test_ranks_of_one_device_talk_through_the_host() -> None:
    memory = set_up_on(MODELS["8B"], "P2->T2", 24, costs=costs_of("cuda", collectives=False)).memory
    assert all("collectives" not in dict(parts) and "context" in dict(parts) for parts in memory.parts)


def test_more_heads_and_splits_than_a_librarys_workspace_count_by_their_partial_results() -> None:
    # (4096 + 1024) entries of 64 heads of 128 sums, a maximum and a denominator in float32: 162.5 MiB
    memory = set_up_on(MODELS["70B"], "T1", 200, max_running=4096).memory
    assert dict(memory.parts[0])["attention"] == 5120 * 64 * 130 * 4
    # four ranks have 16 heads each, which take less than is set aside for FlashInfer
    memory = set_up_on(MODELS["70B"], "T4", 80, max_running=4096).memory
    assert dict(memory.parts[0])["attention"] == 136 * MIB


def test_logits_are_bounded_whatever_runs() -> None:
    # 348 rows of 3 x 128,256 float32, not 1,024 of them
    memory = set_up_on(MODELS["8B"], "T1", 80, max_running=1024).memory
    assert dict(memory.parts[0])["logits"] == 348 * 3 * 128_256 * 4 <= 512 * MIB
    # ranks that do not sample have their part of the vocabulary alone
    memory = set_up_on(MODELS["8B"], "T4", 80, max_running=1024).memory
    logits = [dict(parts)["logits"] for parts in memory.parts]
    assert logits == [348 * 4 * (32_064 + 2 * 128_256), *[348 * 4 * 32_064] * 3]


def test_cpu_ranks_take_nothing_beside_the_model() -> None:
    assert costs_of("cpu") is HOST and costs_of("cuda") is CUDA is costs_of("cuda:1")
    memory = set_up_on(MODELS["8B"], "P2->T2", 24, costs=HOST).memory
    assert all(set(dict(parts)) == {"activations", "logits"} for parts in memory.parts)


# ---- known models on known cards -----------------------------------------------------------------------------------
# MiB of the rank that has the least left: the card, weights, workspace (activations, logits and what CUDA takes), and
# what that leaves, over a KV block of 16 tokens. Whole, 8B has 15,316.5 of weights, 34B 64,361.5, 70B 134,570.5.


@pytest.mark.parametrize(
    ("name", "plan", "gib", "mode", "blocks"),
    [
        # 24,576 - 15,316.5 - 1,745.8 = 7,513.7, at 16 x 128 KiB = 2 MiB: 60,096 tokens
        ("8B", "T1", 24, "resident", (3756, 3756)),
        # Twice the card: 24,576 more, at 2
        ("8B", "T1", 48, "resident", (3756 + 12_288, 3756 + 12_288)),
        # A rank of D4 has the whole model, and 8 of a piece beside it while a layer changes; T4's communicators (384)
        # and churn come to it (1/32 of what T4 does not take over as it is), and its graphs are smaller:
        # 24,576 - 15,324.5 - 2,233.7 = 7,017.8, at 2 under D4 and 0.5 under T4
        ("8B", "D4->T4", 24, "delta", (3508, 14_035)),
        # A quarter: 24,576 - 16,091.5 - 1,826.1 = 6,658.4, at 16 x 48 KiB = 0.75: 142,032 tokens
        ("34B", "T4", 24, "resident", (8877, 8877)),
        # The last rank: 24,576 - 16,372.4 - 2,665.7 = 5,537.9, at 0.75
        ("34B", "P4->T4", 24, "delta", (7383, 7383)),
        # 81,920 - 64,361.5 - 1,683.2 = 15,875.3, at 3: 84,656 tokens
        ("34B", "T1", 80, "resident", (5291, 5291)),
        # The last rank has ten layers and the LM head, more than an eighth (16,823.5):
        # 24,576 - 18,340.3 - 3,281.9 = 2,953.8, at 16 x 40 KiB = 0.625: 75,616 tokens
        ("70B", "P8->T8", 24, "delta", (4726, 4726)),
        # 49,152 - 34,676.6 - 3,668.9 = 10,806.5, at 1.25: 138,320 tokens
        ("70B", "P4->T4", 48, "delta", (8645, 8645)),
        # Half: 81,920 - 67,286.5 - 2,133.7 = 12,499.8, at 2.5
        ("70B", "T2", 80, "resident", (4999, 4999)),
    ],
)
def test_what_fits(name: str, plan: str, gib: int, mode: str, blocks: tuple[int, int]) -> None:
    memory = set_up_on(MODELS[name], plan, gib).memory
    assert (memory.mode, memory.device_blocks) == (mode, blocks)


@pytest.mark.parametrize(
    ("name", "plan", "gib", "said"),
    [
        # 64,361.5 MiB of 48 GiB
        (
            "34B",
            "T1",
            48,
            "plan T1 does not fit: of 48.0 GiB device memory, rank 0 needs 62.9 GiB for weights",
        ),
        # Half, 32,182 MiB of 24 GiB
        (
            "34B",
            "T2",
            24,
            r"rank 0 needs 31.4 GiB for weights, 512.0 MiB for context, .* 8 smaller parts, which",
        ),
        # A quarter, 32.9 of 24 GiB
        ("70B", "T4", 24, "rank 0 needs 32.9 GiB for weights, .* leaves 0 B for KV at 80.0 KiB a token"),
        # Both phases have a replica of four ranks: the same
        (
            "70B",
            "D2P4->D2T4",
            24,
            r"GiB for weights \(reload transitions\), .* and a sequence of 4096 tokens needs",
        ),
        # Half, 65.7 of 48 GiB
        ("70B", "T2", 48, "rank 0 needs 65.7 GiB for weights"),
        # Keeping both takes 2 x 16.4 GiB less what stays
        ("70B", "P8->T8", 24, r"GiB for weights \(resident transitions\)"),
    ],
)
def test_what_is_refused_with_its_arithmetic(name: str, plan: str, gib: int, said: str) -> None:
    mode = "resident" if "resident" in said else None
    with pytest.raises(MemoryBudgetError, match=said):
        set_up_on(MODELS[name], plan, gib, transition=mode)


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_plan_fits_or_is_refused(name: str, world: int) -> None:
    """All pairs of layouts on cards of 24, 48 and 80 GB: what is accepted is within the card in every part, and what
    is refused would not be, by the needs that the same plan has where there is room for everything."""
    fit = dict.fromkeys((24, 48, 80), 0)
    for prefill, decode in itertools.product(Layout.all(world), repeat=2):
        plan = Plan(prefill, decode, separate=prefill != decode)
        least = max(needed(model(name), plan))
        for gib in fit:
            try:
                memory = set_up(model(name), plan, "bfloat16", limits(gib)).memory
            except MemoryBudgetError as refusal:
                assert least > gib * GIB, f"{plan} on {gib} GiB"
                assert_has_arithmetic(str(refusal), gib)
            else:
                assert least <= gib * GIB, f"{plan} on {gib} GiB"
                assert_within(memory, plan, gib * GIB)
                fit[gib] += 1
    assert fit[24] <= fit[48] <= fit[80]
    assert fit[80] > 0 or world * 80 < model(name).weight_bytes() / GIB + 2


def needed(planned: PlannedModel, plan: Plan) -> list[int]:
    """Bytes of each rank for weights that are loaded anew, workspace, and one sequence of `LENGTH` tokens."""
    memory = set_up(planned, plan, "bfloat16", limits(4096, transition="reload", host_kv=64 * GIB)).memory
    assert memory.device_blocks == (LENGTH // 16 * 256,) * 2, "as many as all that may run can fill"
    return [
        weights + workspace + pool // 256
        for weights, workspace, pool in zip(memory.weights, memory.workspace, memory.pool, strict=True)
    ]


def assert_within(memory: MemoryPlan, plan: Plan, card: int) -> None:
    talks = any(layout.tp * layout.pp > 1 for layout in (plan.prefill, plan.decode))
    for rank in range(plan.world):
        parts = {name.replace(" ", "_"): size for name, size in memory.components(rank)}
        assert set(parts) - {"logits"} == ALWAYS | ({"collectives"} if talks else set())
        assert min(parts.values()) > 0
        assert (
            sum(parts.values()) == memory.weights[rank] + memory.workspace[rank] + memory.pool[rank] <= card
        )
    assert any("logits" in dict(parts) for parts in memory.parts)


def assert_has_arithmetic(text: str, gib: int) -> None:
    pattern = (
        rf"of {gib}\.0 GiB device memory, rank \d needs ([\d.]+) GiB for weights.*, [\d.]+ [GM]iB for \w+.* and "
        r"[\d.]+ [GM]iB for \d+ smaller parts, which leaves .* for KV at [\d.]+ [KM]iB a token, and a sequence of "
        rf"{LENGTH} tokens needs"
    )
    assert re.search(pattern, text), text
    assert "\n" not in text


# ---- what holds for all of them ------------------------------------------------------------------------------------


@st.composite
def costs(draw: st.DrawFn) -> DeviceCosts:
    """Of devices as small as the models here."""
    small = {field.name: draw(st.integers(0, 300)) for field in fields(DeviceCosts)}
    return DeviceCosts(**{**small, "churn": draw(st.floats(0, 1))})  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple[PlannedModel, Plan, Limits]:
    spec: ModelSpec = draw(specs())
    layouts = usable(spec, draw(st.integers(1, 6)))
    assume(layouts)
    prefill, decode = draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))
    plan = Plan(prefill, decode, separate=prefill != decode or draw(st.booleans()))
    given = Limits(
        device_memory=draw(st.integers(5_000, 400_000)),
        host_kv=draw(st.integers(1_000, 100_000)),
        chunk=draw(st.integers(1, 64)),
        max_running=draw(st.integers(1, 40)),
        max_model_len=draw(st.none() | st.integers(2, 40)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        transition=draw(st.sampled_from([None, *MODES])),
        costs=draw(st.just(HOST) | costs()),
    )
    return stored_as(spec, "float32", "random"), plan, given


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_an_accepted_plan_never_takes_more_than_its_budget(case: tuple[PlannedModel, Plan, Limits]) -> None:
    planned, plan, asked = case
    try:
        memory = set_up(planned, plan, "float32", asked).memory
    except MemoryBudgetError:
        return
    spec, shardings = planned.spec, plan_shardings(planned, plan)
    for rank in range(plan.world):
        parts = dict(memory.components(rank))
        assert sum(parts.values()) <= asked.device_memory
        assert sum(size for _, size in memory.parts[rank]) == memory.workspace[rank]
        # weights: in each phase, and at the peak of both ways of changing over, by the copy lists of the engine
        held = [weight_bytes(spec, sharding, rank, "float32") for sharding in shardings]
        if shardings[0] != shardings[1]:
            held += [
                plan_peak_bytes(spec, old, new, mode=memory.mode, dtype="float32", rank=rank)
                for old, new in itertools.permutations(shardings)
            ]
        assert parts["weights"] == max(held)
        for sharding, blocks in zip(shardings, memory.device_blocks, strict=True):
            view = rank_view(spec, sharding, rank)
            token = 2 * len(view.layers) * len(view.kv_heads) * spec.head_dim * 4
            assert blocks * asked.block_size * token <= parts["KV pool"]


@settings(max_examples=60, deadline=None)
@given(case=cases(), more=st.integers(0, 200_000))
def test_more_memory_never_gives_fewer_blocks(case: tuple[PlannedModel, Plan, Limits], more: int) -> None:
    """With one mode of transition. Where the plan chooses it, keeping both shardings may take a fifth."""
    planned, plan, asked = case
    share = 1.0 if asked.transition or not plan.reshards else 0.8
    try:
        before = set_up(planned, plan, "float32", asked).memory
    except MemoryBudgetError:
        return
    after = set_up(planned, plan, "float32", replace(asked, device_memory=asked.device_memory + more)).memory
    assert min(after.device_blocks) >= int(share * min(before.device_blocks))
    assert after.max_model_len >= int(share * before.max_model_len)


@settings(max_examples=60, deadline=None)
@given(case=cases(), more=st.integers(1, 100), mode=st.sampled_from(MODES))
def test_more_sequences_never_leave_more_room(
    case: tuple[PlannedModel, Plan, Limits], more: int, mode: Mode
) -> None:
    planned, plan, asked = case
    ranks = demands(planned, plan_shardings(planned, plan))
    budgets = [asked.budget(plan.prefill, separate=plan.separate)]
    budgets.append(replace(budgets[0], max_running=asked.max_running + more))
    few, many = (Books(planned, "float32", budget, (plan.prefill, plan.decode)) for budget in budgets)
    assert all(a >= b for a, b in zip(few.blocks(ranks, mode), many.blocks(ranks, mode), strict=True))
    for rank in ranks:
        larger = dict(many.parts(rank, mode))
        for name, size in few.parts(rank, mode):
            if name not in ("activations", "logits"):  # of the phase that has more of both together
                assert size <= larger[name]


def test_the_plan_and_its_budget_agree_with_the_sum() -> None:
    """`plan_memory` is what `set_up` takes; a byte less than the sum of the fullest rank gives a block less."""
    asked = limits(24)
    memory = set_up(model(MODELS["8B"]), Plan.parse("T1"), "bfloat16", asked).memory
    exact = sum(size for _, size in memory.components(0))
    shardings = plan_shardings(model(MODELS["8B"]), Plan.parse("T1"))
    for less, blocks in ((0, 3756), (1, 3755)):
        budget = replace(asked, device_memory=exact - less).budget(Layout(), separate=False)
        assert plan_memory(model(MODELS["8B"]), shardings, "bfloat16", budget).device_blocks[0] == blocks


# ---- the bounds that execution keeps -------------------------------------------------------------------------------


def test_rows_of_logits_at_once() -> None:
    assert logit_rows(128_256) == 348 and logit_rows(151_936) == 294 and logit_rows(1) == 44_739_242
    assert logit_rows(1 << 40) == 1, "at least one"


def test_batches_that_are_captured() -> None:
    assert graph_batches(1) == (1,) and graph_batches(3) == (1, 2, 3)
    assert graph_batches(20) == (1, 2, 4, 8, 16, 20)
    assert graph_batches(256)[-3:] == (224, 240, 256) and len(graph_batches(256)) == 23
    assert graph_batches(1024) == graph_batches(4096)
    for most in range(1, 1025):
        sizes = graph_batches(most)
        assert sizes[-1] == most and all(a < b for a, b in itertools.pairwise(sizes))
