"""The search: closed form against twin, what it ranks, and that better hardware is never worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.planning.candidates import Ranking
from seesaw.planning.search import SearchOptions, search
from seesaw.planning.statistics import statistics
from seesaw.planning.workloads import Workload, workload
from tests.planning.machines import hardware, line, model

SLOW = {
    "ranks": 4,
    "all_reduce": {n: line(2e-5, 4e7 / n) for n in (2, 4)},
    "send": line(2e-5, 4e7),
    "bandwidth": 2e9,
}
"""Links on which pipelines prefill better, and memory that tensor parallelism reads faster."""


def job(count: int = 240, prompt: int = 200, output: int = 60, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 2 * prompt, count)
    return Workload("made up", prompts, rng.integers(1, 2 * output, count))


def found(node: HardwareSpec | None = None, work: Workload | None = None, **changes: Any) -> Ranking:
    options: dict[str, Any] = {"device_memory": 260 << 20, "host_kv": 256 << 20, "replays": 4}
    return search(
        model(), node or hardware(**SLOW), work or job(), options=SearchOptions(**(options | changes))
    )


def test_slow_links_are_what_re_sharding_is_for() -> None:
    ranking = found(max_running=16)
    assert ranking.best.plan.reshards and ranking.best.plan.prefill.pp > 1 and ranking.best.plan.decode.tp > 1
    assert ranking.best_static is not None and ranking.best_static.seconds > 1.1 * ranking.best.seconds
    assert [c.seconds for c in ranking.replayed] == sorted(c.seconds for c in ranking.replayed)
    assert len(ranking.replayed) == 4 and ranking.considered > 100
    assert all(c.setup is not None and c.simulated is not None for c in ranking.replayed)
    assert ranking.bound.seconds < ranking.best.seconds


def test_every_pair_of_layouts_is_considered() -> None:
    ranking = found(device_memory=2 << 30)
    layouts = ("T1", "T2", "T4", "P2", "P4", "D2", "D4", "P2T2", "D2T2", "D2P2")
    expected = {Layout.parse(text) for text in layouts if Layout.parse(text).world == 4}
    plans = {c.plan for c in (*ranking.replayed, *ranking.others)}
    assert plans == {Plan(a, b, separate=True) for a in expected for b in expected} | {
        Plan(a, a, separate=False) for a in expected
    }
    assert {Plan.parse("D2P2->T4"), Plan.parse("P4->D2T2")} <= plans


def test_without_communication_there_is_little_to_gain() -> None:
    """And one replica per rank reads most weights: with memory to spare, arithmetic decides, which all share."""
    free = hardware(
        ranks=4, all_reduce={n: line(0.0, 1e15) for n in (2, 4)}, send=line(0.0, 1e15), bandwidth=1e12
    )
    ranking = found(free, device_memory=2 << 30)
    assert ranking.best_static is not None
    assert ranking.best_static.seconds < 1.1 * ranking.best.seconds


@pytest.mark.parametrize("output", [1, 8, 60, 200])
def test_the_closed_form_agrees_with_the_twin(output: int) -> None:
    for plan in ("P4->T4", "P4->P4", "D2P2->T4", "T4", "P4", "P2T2"):
        ranking = found(work=job(400, output=output), plans=(Plan.parse(plan),), chunk=128, max_running=32)
        assert ranking.best.estimate.seconds == pytest.approx(ranking.best.seconds, rel=0.15), plan


def test_better_hardware_never_makes_the_best_plan_slower() -> None:
    """But for what scheduling by lists allows: a job may turn at another moment, and take a per cent longer."""
    base = found(replays=3, work=job(120)).best.seconds
    for better in (
        {"bandwidth": 4e9},
        {"flops": {"bfloat16": 2e12}},
        {"all_reduce": {n: line(1e-5, 4e8 / n) for n in (2, 4)}},
        {"send": line(1e-5, 4e8)},
        {"to_device": 4e9, "node_to_device": 8e9, "to_host": 4e9, "node_to_host": 8e9},
    ):
        better_node = hardware(**(SLOW | better))
        assert found(better_node, job(120), replays=3).best.seconds <= 1.02 * base, better
    assert found(device_memory=520 << 20, replays=3, work=job(120)).best.seconds <= 1.02 * base
    assert found(host_kv=512 << 20, replays=3, work=job(120)).best.seconds <= 1.02 * base


def test_the_same_search_finds_the_same() -> None:
    first, second = found(), found()
    assert [(c.plan, c.limits, c.seconds) for c in first.replayed] == [
        (c.plan, c.limits, c.seconds) for c in second.replayed
    ]


def test_long_jobs_are_replayed_in_part() -> None:
    work = job(1500)
    part = found(work=work, replayed_tokens=120_000, plans=(Plan.parse("P4->T4"), Plan.parse("T4")))
    whole = found(work=work, replayed_tokens=10**9, plans=(Plan.parse("P4->T4"), Plan.parse("T4")))
    assert part.best.simulated is not None and part.best.simulated.requests < 1000
    assert whole.best.simulated is not None and whole.best.simulated.requests == 1500
    for one, other in zip(part.replayed, whole.replayed, strict=True):
        assert one.plan == other.plan
        assert one.seconds == pytest.approx(other.seconds, rel=0.1)
    assert part.best.rate == pytest.approx(whole.best.rate, rel=0.1)


def test_what_is_fixed_stays_fixed() -> None:
    ranking = found(chunk=512, max_running=24, policy=None)
    assert {(c.limits.chunk, c.limits.max_running) for c in ranking.replayed} == {(512, 24)}


def test_plans_that_do_not_fit_are_refused_with_the_reason() -> None:
    ranking = found(device_memory=120 << 20)
    refused = dict(ranking.refused)
    assert "D4" in refused and "memory" in refused["D4"]
    assert "D4" not in {c.name for c in (*ranking.replayed, *ranking.others)}


def test_a_model_that_fits_nowhere_says_what_would_do() -> None:
    with pytest.raises(MemoryBudgetError, match=r"made up.*fits no layout"):
        found(device_memory=20 << 20)


def test_statistics_of_equal_requests() -> None:
    of = statistics(Workload("equal", np.full(100, 50), np.full(100, 11)))
    assert (of.prompt, of.output, of.steps) == (50.0, 11.0, 10.0)
    assert of.fresh.steps == of.fresh.tokens == 10
    assert of.running.tokens == pytest.approx(5.0, rel=0.05)  # met half-way through, on average
    assert of.running_prompt == 50 and of.context == pytest.approx(55.5)
    assert of.held == pytest.approx(61.0)


def test_statistics_of_requests_without_decoding() -> None:
    of = statistics(Workload("one token", np.full(10, 50), np.ones(10)))
    assert of.steps == 0 and of.fresh.tokens == 0 and of.running.tokens == 0


def test_a_sample_of_a_named_workload_keeps_its_means() -> None:
    whole = workload("sharegpt", 2000)
    ranking = found(
        work=replace(whole.within(1000), arrival_s=None),
        replayed_tokens=150_000,
        plans=(Plan.parse("T4"),),
        max_running=32,
    )
    assert ranking.best.simulated is not None
    requests = ranking.best.simulated.requests
    assert ranking.best.simulated.output_tokens / requests == pytest.approx(
        whole.within(1000).mean_output, rel=0.3
    )
