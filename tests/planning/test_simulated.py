"""The simulated executor: timelines worked out by hand, and whole jobs under the engine's own scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from seesaw.core.actions import (
    CopiesDone,
    Forward,
    ForwardDone,
    SwapIn,
    SwapOut,
    Transition,
    TransitionDone,
)
from seesaw.core.layout import Plan
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.planning.cost import LayoutCost
from seesaw.planning.simulated import Moves, SimulatedExecutor, work_of
from seesaw.scheduling.config import SchedulerConfig
from seesaw.scheduling.integrity import check_integrity
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from tests.planning.machines import hardware, model

MOVES = Moves(
    block_bytes=1e6,
    to_host=(1e-3, 1e-3),
    to_device=(5e-4, 5e-4),
    transition_bytes=(100, 200),
    transition_seconds=((0.1, 0.1), (0.2, 0.4)),
)


def executor(plan: str = "P2->T2", **changes: Any) -> SimulatedExecutor:
    parsed = Plan.parse(plan)
    stages = {1: [8], 2: [4, 4]}
    costs = tuple(
        LayoutCost(model(), hardware(**changes), layout, stages[layout.pp])
        for layout in (parsed.prefill, parsed.decode)
    )
    ranks = tuple(
        [[list(range(s * layout.tp, (s + 1) * layout.tp)) for s in range(layout.pp)]]
        for layout in (parsed.prefill, parsed.decode)
    )
    return SimulatedExecutor(costs, ranks, MOVES, separate=parsed.separate)  # type: ignore[arg-type]


def prompt(id: int, count: int, blocks: int = 0, **changes: Any) -> Forward:
    fields: dict[str, Any] = {
        "id": id,
        "replica": 0,
        "slots": [0],
        "starts": [0],
        "counts": [count],
        "tokens": [1] * count,
        "sampled": [0],
        "open": [],
        "close": [],
        "new_blocks": [],
        "write_through": [(i, i) for i in range(blocks)],
        "feedback": False,
        "feedback_from": -1,
    }
    return Forward(**(fields | changes))


def stage_seconds(found: SimulatedExecutor, forward: Forward) -> list[float]:
    cost = found._shapes[0].cost
    return [cost.stage(stage, work_of(forward)).seconds for stage in range(len(cost.stages))]


def test_work_tells_prompts_from_steps() -> None:
    mixed = prompt(1, 0, counts=[1, 3], starts=[9, 4], tokens=[1] * 4, sampled=[0, 1])
    work = work_of(mixed)
    assert (work.tokens, work.sampled) == (4, 2)
    assert (work.keys, work.pairs) == (10.0, 3 * 4 + 6.0)
    step = prompt(2, 0, counts=[1, 1], starts=[9, 4], tokens=[1, 1], sampled=[0, 1])
    assert work_of(step).keys == 15.0 and work_of(step).pairs == 0.0


def test_a_pipeline_overlaps_micro_batches() -> None:
    found = executor()
    forwards = [prompt(1, 512), prompt(2, 512)]
    first, second = stage_seconds(found, forwards[0])
    hand_over = found._shapes[0].cost.hand_over(512)
    for forward in forwards:
        found.submit(forward)
    assert found.wait() == [ForwardDone(1, [0], [])]
    assert found.now == pytest.approx(first + hand_over + second)
    assert found.wait() == [ForwardDone(2, [0], [])]
    assert found.now == pytest.approx(2 * first + hand_over + second + max(0.0, second - first))


def test_a_step_waits_for_the_token_it_feeds() -> None:
    found = executor()
    found.submit(prompt(1, 512, feedback=True))
    found.submit(prompt(2, 1, feedback_from=1))
    found.wait()
    before = found.now
    found.wait()
    hand_over = found._shapes[0].cost.hand_over(1)
    assert found.now == pytest.approx(before + sum(stage_seconds(found, prompt(2, 1))) + hand_over)
    assert found.report()["prefill"].causes["bubble"] > 0.0


def drain(found: SimulatedExecutor) -> list[tuple[type, int, float]]:
    done = []
    while found.in_flight:
        done += [(type(completion), completion.id, found.now) for completion in found.wait()]
    return done


def test_copies_run_beside_computation_and_one_after_the_other() -> None:
    found = executor()
    forward = prompt(1, 512, blocks=400)
    found.submit(forward)
    found.submit(SwapOut(2, 0, [(0, 0)] * 100))
    found.submit(SwapIn(3, 0, [(0, 0)] * 100))
    found.submit(prompt(4, 512))
    first, second = stage_seconds(found, forward)
    enters = first + found._shapes[0].cost.hand_over(
        512
    )  # when the last stage begins, and its copies with it
    assert enters + second < 0.4
    done = drain(found)
    assert [(kind, id) for kind, id, _ in done] == [
        (ForwardDone, 1),
        (ForwardDone, 4),
        (CopiesDone, 1),
        (CopiesDone, 2),
        (CopiesDone, 3),
    ]
    times = [time for kind, _, time in done if kind is CopiesDone]
    assert times == pytest.approx([enters + 0.4, enters + 0.5, enters + 0.55])


def test_a_swap_waits_for_the_forwards_before_it() -> None:
    found = executor()
    found.submit(prompt(1, 512))
    found.submit(SwapIn(2, 0, [(0, 0)] * 100))
    (_, _, forward), (_, _, swap) = drain(found)
    assert swap == pytest.approx(forward + 0.05)


def test_a_rank_changes_over_when_its_copies_are_through() -> None:
    found = executor()
    forward = prompt(1, 512, blocks=400)
    found.submit(forward)
    found.submit(Transition(2, 1))
    done = drain(found)
    enters = stage_seconds(found, forward)[0] + found._shapes[0].cost.hand_over(512)
    assert done[-1][0] is TransitionDone
    assert done[-1][2] == pytest.approx(max(0.4 + 0.2, enters + 0.4 + 0.4))
    report = found.report()
    assert report["transition"].seconds == pytest.approx(done[-1][2] - 0.4)
    assert report["transition"].causes["transition"] == pytest.approx((enters + 0.8 - 0.4 + 0.4) / 2)


def test_ranks_change_over_when_their_stage_is_through() -> None:
    found = executor()
    forward = prompt(1, 2048)
    first, second = stage_seconds(found, forward)
    found.submit(forward)
    found.submit(Transition(2, 1))
    found.submit(prompt(3, 1))
    completions = [found.wait()[0] for _ in range(3)]
    ends = (first + 0.2, first + found._shapes[0].cost.hand_over(2048) + second + 0.4)
    changed = completions[1]
    assert isinstance(changed, TransitionDone)
    assert (changed.bytes, changed.moving) == (200, 0.4)
    assert changed.seconds == pytest.approx(max(ends) - first)
    step = found._shapes[1].cost.stage(0, work_of(prompt(3, 1))).seconds
    assert found.now == pytest.approx(max(ends) + step)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("plan", "policy"),
    [
        ("P2->T2", "seesaw"),
        ("P2->T2", "decode-first"),
        ("T2->T2", "prefill-first"),
        ("T2", "chunked"),
        ("P2", "decode-first"),
        ("P2", "chunked"),
    ],
)
def test_whole_jobs_end_with_every_token(plan: str, policy: str, overlap: bool) -> None:
    settings = SchedulerConfig(
        plan=Plan.parse(plan),
        policy=policy,  # type: ignore[arg-type]
        block_size=16,
        device_blocks=(40, 40),
        host_blocks=120,
        max_model_len=256,
        max_batch_tokens=128,
        max_running=16,
        overlap=overlap,
    )

    def run() -> tuple[float, int, int]:
        scheduler, found = Scheduler(settings, create_policy(settings)), executor(plan)
        for i in range(60):
            sampling = SamplingParams(temperature=0, max_tokens=1 + i * 7 % 40)
            ids = tuple(range(1, 2 + i * 13 % 90))
            scheduler.add(Request(id=str(i), prompt_token_ids=ids, sampling=sampling), frozenset())
        scheduler.more_expected = False
        generated = 0
        while scheduler.unfinished:
            for action in scheduler.schedule():
                found.submit(action)
            for completion in found.wait():
                generated += len(scheduler.complete(completion))
            check_integrity(scheduler)
        return found.now, generated, scheduler.counters.recomputed

    seconds, generated, recomputed = run()
    assert recomputed or generated == sum(1 + i * 7 % 40 for i in range(60))
    assert seconds > 0.0 and run() == (seconds, generated, recomputed)
