"""What each policy is for: few transitions, full batches, mixed batches."""

from __future__ import annotations

import random
from typing import Any

import pytest

from seesaw.core.actions import DECODE, Action, Forward, Transition
from seesaw.core.errors import ConfigError, RequestError
from seesaw.core.layout import Plan
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.scheduling.batch import BatchBuilder
from seesaw.scheduling.config import SchedulerConfig, TurnCosts
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.policies.phased import PhasedPolicy
from seesaw.scheduling.scheduler import Scheduler
from tests.scheduling.paged_stub import PagedStub


def config(plan: str, policy: str, **changes: Any) -> SchedulerConfig:
    settings: dict[str, Any] = {
        "block_size": 4,
        "device_blocks": (32, 32),
        "host_blocks": 256,
        "max_model_len": 64,
        "max_batch_tokens": 64,
        "max_running": 8,
    }
    return SchedulerConfig(plan=Plan.parse(plan), policy=policy, **(settings | changes))  # type: ignore[arg-type]


def request(number: int, prompt: int = 8, output: int = 12) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=output)
    return Request(id=str(number), prompt_token_ids=tuple(range(1, prompt + 1)), sampling=sampling)


def serve(scheduler: Scheduler, requests: list[Request]) -> list[Action]:
    """All actions of a job whose executor completes everything at once."""
    stub = PagedStub(scheduler.config.block_size, random.Random(0))
    for each in requests:
        scheduler.add(each, frozenset())
    scheduler.more_expected = False
    actions: list[Action] = []
    while scheduler.unfinished:
        for action in scheduler.schedule():
            actions.append(action)
            stub.submit(action)
        while stub.busy:
            completion = stub.step()
            if completion is not None:
                scheduler.complete(completion)
    return actions


def make(settings: SchedulerConfig) -> Scheduler:
    return Scheduler(settings, create_policy(settings))


def transitions(actions: list[Action]) -> int:
    return sum(isinstance(action, Transition) for action in actions)


def test_seesaw_changes_over_least() -> None:
    counts = {}
    for policy in ("seesaw", "prefill-first", "decode-first"):
        scheduler = make(config("P2->T2", policy))
        counts[policy] = transitions(serve(scheduler, [request(i, output=4 + i % 17) for i in range(200)]))
    assert counts["seesaw"] < counts["decode-first"] < counts["prefill-first"], counts


def test_seesaw_needs_one_transition_when_the_host_holds_the_job() -> None:
    scheduler = make(config("P2->T2", "seesaw", host_blocks=1000))
    assert transitions(serve(scheduler, [request(i) for i in range(100)])) == 1


def test_seesaw_turns_back_when_it_pays() -> None:
    """Dear turns wait until the batch is thin, dear steps make it turn early; swapping counts as well."""
    parked = {}
    for name, costs in {
        "dear turn": TurnCosts(step=1.0, turn=1e4, block=0.0),
        "even": TurnCosts(step=1.0, turn=30.0, block=0.1),
        "dear step": TurnCosts(step=1.0, turn=1.0, block=0.0),
        "dear swap": TurnCosts(step=1.0, turn=1.0, block=1e3),
    }.items():
        scheduler = make(config("P2->T2", "seesaw", turn_costs=costs, host_blocks=64, device_blocks=(64, 64)))
        serve(scheduler, [request(i, output=4 + i * 7 % 40) for i in range(200)])
        parked[name] = scheduler.counters.swapped_out
    assert parked["dear turn"] < parked["even"] < parked["dear step"], parked
    assert parked["dear swap"] <= parked["dear turn"], parked


def test_parked_sequences_cost_more_the_less_they_leave_of_the_buffer() -> None:
    shares = {}
    for blocks in (64, 128, 1024):
        costs = TurnCosts(step=1.0, turn=30.0, block=0.0)
        policy = PhasedPolicy("seesaw")
        scheduler = Scheduler(config("P2->T2", "seesaw", turn_costs=costs, host_blocks=blocks), policy)
        policy._largest_batch = 16
        shares[blocks] = policy._thin(scheduler, residents=8, parked=48)
    assert shares[64] < shares[128] < shares[1024] < 1, shares
    assert shares[64] == pytest.approx(1 / (1 + 16 * (30 / 16) * 48 / 8 / 32))


@pytest.mark.parametrize("plan", ["P4->P4", "P4"])
def test_the_groups_of_a_pipeline_take_turns(plan: str) -> None:
    """Also where they fill one after the other: each waits for all the others before it comes again."""
    policy = "chunked" if plan == "P4" else "seesaw"
    scheduler = make(config(plan, policy, device_blocks=(200, 200), host_blocks=500, max_batch_tokens=8))
    for i in range(24):
        scheduler.add(request(i, output=30), frozenset())
    scheduler.more_expected = False
    stub = PagedStub(4, random.Random(0))
    dealt: list[int] = []
    submit = scheduler.submit

    def watched(batch: BatchBuilder) -> None:
        if batch.sequences and (scheduler.phase == DECODE or plan == "P4"):
            dealt.append(batch.group)
        submit(batch)

    scheduler.submit = watched  # type: ignore[method-assign]
    while scheduler.unfinished:
        for action in scheduler.schedule():
            stub.submit(action)
        completion = stub.step()  # one at a time, so that swap-ins fill the groups bit by bit
        if completion is not None:
            scheduler.complete(completion)
    settled = dealt[len(dealt) // 3 : len(dealt) // 2]
    assert len(settled) > 12
    assert all(sorted(settled[i : i + 4]) == [0, 1, 2, 3] for i in range(len(settled) - 3)), settled


def test_micro_batches_can_be_more_than_stages() -> None:
    scheduler = make(config("P2", "chunked", micro_batches=(3, 3), device_blocks=(200, 200)))
    serve(scheduler, [request(i) for i in range(40)])
    assert len(scheduler.replicas[0].groups) == 3
    with pytest.raises(ConfigError, match="micro_batches"):
        config("P2", "chunked", micro_batches=(0, 1))


def test_chunked_mixes_decode_with_prompts() -> None:
    scheduler = make(config("T2", "chunked", max_batch_tokens=16))
    forwards = [a for a in serve(scheduler, [request(i) for i in range(20)]) if isinstance(a, Forward)]
    mixed = [f for f in forwards if 1 in f.counts and max(f.counts) > 1]
    assert len(mixed) > 3
    assert max(sum(f.counts) for f in forwards) <= 16


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "decode-first"])
@pytest.mark.parametrize("plan", ["D2", "P2", "D2P2"])
@pytest.mark.parametrize("count", [8, 40])
def test_static_plans_deal_prompts_evenly(policy: str, plan: str, count: int) -> None:
    """Few or many, every replica and every group of a pipeline gets its share of prompts and of batches."""
    scheduler = make(config(plan, policy, device_blocks=(200, 200), max_running=64))
    for i in range(count):
        scheduler.add(request(i), frozenset())
    scheduler.more_expected = False
    forwards = [action for action in scheduler.schedule() if isinstance(action, Forward)]
    sizes = [len(group.sequences) for replica in scheduler.replicas for group in replica.groups]
    each = (
        15 if policy == "chunked" else 16
    )  # two batches of 64 tokens; chunked feeds 8 sequences' next tokens too
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == min(count, each * len(sizes)), sizes
    if count == 40 and len(sizes) == 2:
        assert [sum(forward.counts) for forward in forwards] == [64] * 4


@pytest.mark.parametrize("count", [4, 13, 40])
def test_replicas_share_the_prompts_of_a_prefill_phase(count: int) -> None:
    scheduler = make(config("D4->T4", "seesaw", device_blocks=(200, 200), host_blocks=500))
    forwards = [
        action
        for action in serve(scheduler, [request(i) for i in range(count)])
        if isinstance(action, Forward) and action.write_through
    ]
    fed = [sum(sum(f.counts) for f in forwards if f.replica == i) for i in range(4)]
    assert max(fed) - min(fed) <= 2 * 8, fed


@pytest.mark.parametrize("parts", [(8,), (4, 4)])
def test_the_last_prompts_go_where_least_is_left_to_do(parts: tuple[int, ...]) -> None:
    """Eight prompts of half a batch are two batches for each of two replicas, whether or not these have begun; three
    for one and two for the other would take a quarter longer."""
    settings = config("D2->T2", "seesaw", device_blocks=(400, 400), host_blocks=900, max_batch_tokens=64)
    scheduler = make(settings)
    forwards, number = [], 0
    for part in parts:
        for _ in range(part):
            scheduler.add(request(number, prompt=32), frozenset())
            number += 1
        scheduler.more_expected = number < 8
        forwards += [action for action in scheduler.schedule() if isinstance(action, Forward)]
    assert [(f.replica, sum(f.counts)) for f in forwards] == [(0, 64), (1, 64), (0, 64), (1, 64)]


@pytest.mark.parametrize("policy", ["prefill-first", "decode-first"])
def test_separate_batches_never_mix(policy: str) -> None:
    scheduler = make(config("T2", policy))
    forwards = [a for a in serve(scheduler, [request(i) for i in range(20)]) if isinstance(a, Forward)]
    assert not [f for f in forwards if 1 in f.counts and max(f.counts) > 1]


def test_long_prompts_are_fed_in_chunks() -> None:
    scheduler = make(config("P2->T2", "seesaw", max_batch_tokens=10))
    forwards = [a for a in serve(scheduler, [request(0, prompt=37, output=2)]) if isinstance(a, Forward)]
    assert [f.counts for f in forwards[:4]] == [[10], [10], [10], [7]]
    assert [bool(f.sampled) for f in forwards[:4]] == [False, False, False, True]


def test_one_token_requests_never_touch_the_host() -> None:
    scheduler = make(config("P2->T2", "seesaw"))
    actions = serve(scheduler, [request(i, output=1) for i in range(30)])
    assert transitions(actions) == 0 and scheduler.host.peak == 0


def test_prompts_that_can_never_fit_are_refused() -> None:
    scheduler = make(config("T2", "chunked"))
    with pytest.raises(RequestError, match="64"):
        scheduler.add(request(0, prompt=64), frozenset())
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(request(0, prompt=0), frozenset())
    assert scheduler.unfinished == 0


def test_the_same_input_gives_the_same_actions() -> None:
    jobs = [[request(i, prompt=1 + i % 30, output=1 + i % 20) for i in range(80)] for _ in range(2)]
    first, second = (serve(make(config("D2P2->T4", "seesaw")), job) for job in jobs)
    assert first == second


def test_policies_and_plans_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match="T2->T2"):
        config("T2", "seesaw")
    with pytest.raises(ConfigError, match="static"):
        config("P2->T2", "chunked")
    with pytest.raises(ConfigError, match="choose one of"):
        config("P2->T2", "fifo")
