"""The twin: the same actions as the engine's ranks, every token, and what physics demands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from seesaw.bench.shapes import model_directory
from seesaw.core.actions import Action, Completion, CopiesDone, Forward, Transition
from seesaw.core.errors import ConfigError, RequestError
from seesaw.core.hardware import Curve
from seesaw.core.layout import Plan
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.deployment import Deployment, resolve
from seesaw.engine import Engine
from seesaw.execution.base import Executor
from seesaw.launch import start_local
from seesaw.options import Options
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.simulated import Moves, SimulatedExecutor
from seesaw.planning.twin import CAUSES, Simulated, simulate, simulated_executor
from seesaw.planning.workloads import Workload, workload
from tests.planning.jobs import Job, jobs
from tests.planning.machines import hardware, line, model

LENGTHS = [(1 + i * 37 % 400, 1 + i * 11 % 60) for i in range(80)]


def setup(plan: str, **changes: Any) -> Setup:
    limits: dict[str, Any] = {"device_memory": 480 << 20, "host_kv": 64 << 20, "max_model_len": 512}
    return set_up(model(), Plan.parse(plan), "bfloat16", Limits(**(limits | changes)))


def run(plan: str, node: dict[str, Any] | None = None, **changes: Any) -> Simulated:
    return simulate(setup(plan, **changes), hardware(**(node or {})), LENGTHS)


class InStep:
    """Hands completions over only when nothing is in flight, in the order of their actions.

    So that what the scheduler is told does not depend on how fast anything is.
    """

    def __init__(self, inner: Executor) -> None:
        self.actions: list[Action] = []
        self._inner, self._expected = inner, 0

    def submit(self, action: Action) -> None:
        self.actions.append(action)
        self._expected += 2 if isinstance(action, Forward) and action.write_through else 1
        self._inner.submit(action)

    def wait(self) -> list[Completion]:
        found: list[Completion] = []
        while len(found) < self._expected:
            found += self._inner.wait()
        self._expected = 0
        return sorted(found, key=lambda done: (done.id, isinstance(done, CopiesDone)))

    def close(self) -> None:
        self._inner.close()


def requests() -> Iterator[Request]:
    for i, (prompt, output) in enumerate(LENGTHS[:40]):
        sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        yield Request(id=str(i), prompt_token_ids=(3,) * (1 + prompt // 8), sampling=sampling)


def actions_of(deployment: Deployment, executor: Executor) -> list[Action]:
    """What the engine has an executor do; of tokens, how many."""
    watched = InStep(executor)
    try:
        answers = list(Engine(deployment, watched, None).run(requests()))
    finally:
        watched.close()
    assert [answer.error for answer in answers] == [None] * 40
    return [
        msgspec.structs.replace(action, tokens=[0] * len(action.tokens))
        if isinstance(action, Forward)
        else action
        for action in watched.actions
    ]


def deployment_of(plan: str, folder: Path, **changes: Any) -> Deployment:
    options: dict[str, Any] = {
        "device_memory": "96MiB",
        "host_kv": "2MiB",
        "max_running": 6,
        "chunk": 64,
        "max_model_len": 128,
    }
    directory = str(model_directory("tiny", folder / "model"))
    fixed: dict[str, Any] = {"model": directory, "load_format": "dummy", "dtype": "float32"}
    return resolve(Options(plan=plan, **(fixed | options | changes)))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("plan", ["P2->T2", "T2->D2", "T2", "D2"])
def test_both_executors_are_told_the_same(plan: str, overlap: bool, tmp_path: Path) -> None:
    deployment = deployment_of(plan, tmp_path, overlap=overlap)
    real = actions_of(deployment, start_local(deployment))
    simulated = actions_of(deployment, simulated_executor(deployment.setup, hardware()))
    assert simulated == real
    assert len(real) > 20 and any(isinstance(a, Transition) for a in real) == deployment.plan.reshards


@pytest.mark.parametrize("plan", ["P2->T2", "P2->P2", "D2", "T2"])
def test_the_loop_is_that_of_the_engine(plan: str, tmp_path: Path) -> None:
    """Engine and twin hand the same requests to the same scheduler at the same moments: more of them than it takes
    at once."""
    deployment = deployment_of(plan, tmp_path)
    lengths = [(1 + i * 37 % 50, 1 + i * 11 % 60) for i in range(200)]
    told: list[tuple[float, Action]] = []
    submit = SimulatedExecutor.submit

    def watched(executor: SimulatedExecutor, action: Action) -> None:
        told.append((executor.now, action))
        submit(executor, action)

    with patch.object(SimulatedExecutor, "submit", watched):
        simulate(deployment.setup, hardware(), lengths)
        twin, told = told, []
        served = (
            Request(
                id=str(i),
                prompt_token_ids=(0,) * prompt,
                sampling=SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
            )
            for i, (prompt, output) in enumerate(lengths)
        )
        executor = simulated_executor(deployment.setup, hardware())
        assert all(answer.error is None for answer in Engine(deployment, executor, None).run(served))
    assert len(told) > 200 and twin == told


@pytest.mark.parametrize("plan", ["P4->T4", "D2P2->T4", "T2P2->D2T2", "P4->P4", "T4", "P4", "D4"])
def test_every_token_and_the_same_every_time(plan: str) -> None:
    found = run(plan)
    assert found.prompt_tokens == sum(prompt for prompt, _ in LENGTHS)
    assert found.recomputed == 0 and found.output_tokens == sum(output for _, output in LENGTHS)
    assert run(plan) == found


def check_accounts(found: Simulated) -> None:
    """Every second of every stage has one cause, and every second of the job one phase."""
    tolerance = 1e-9 * found.seconds
    assert sum(phase.seconds for phase in found.phases.values()) == pytest.approx(
        found.seconds, abs=tolerance
    )
    for phase in found.phases.values():
        assert tuple(phase.causes) == CAUSES
        assert sum(phase.causes.values()) == pytest.approx(phase.seconds, abs=tolerance)
        assert min(phase.causes.values()) >= -tolerance


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_books_and_tokens_add_up(job: Job) -> None:
    found = simulate(job.setup, job.hardware, job.workload)
    check_accounts(found)
    assert found.requests == len(job.workload)
    assert found.prompt_tokens == job.workload.prompt.sum()
    assert found.output_tokens == job.workload.output.sum()
    fed = sum(phase.tokens for phase in found.phases.values())
    sampled = sum(phase.forwards * phase.batch for phase in found.phases.values())
    needed = int((job.workload.prompt + job.workload.output - 1).sum())  # the last token is not fed
    assert fed > needed if found.recomputed else fed == needed
    assert sampled == pytest.approx(found.output_tokens)
    assert simulate(job.setup, job.hardware, job.workload) == found


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(arrivals=True))
def test_requests_that_arrive_are_served(job: Job) -> None:
    found, work = simulate(job.setup, job.hardware, job.workload), job.workload
    check_accounts(found)
    assert work.arrival_s is not None and found.latency is not None
    assert (found.requests, found.output_tokens) == (len(work), work.output.sum())
    assert found.seconds > work.arrival_s[-1]
    latency = found.latency
    for percentiles in (latency.ttft, latency.end_to_end):
        assert 0 < percentiles[50] <= percentiles[90] <= percentiles[99] < 1.01 * found.seconds
    assert all(latency.ttft[share] <= latency.end_to_end[share] for share in (50, 90, 99))
    assert bool(latency.inter_token) == bool(work.output.max() > 1)
    assert simulate(job.setup, job.hardware, job.workload) == found


def faster(curve: Curve) -> Curve:
    return Curve(curve.sizes, tuple(seconds / 2 for seconds in curve.values), curve.extends)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_a_better_node_is_not_slower(job: Job) -> None:
    """Of the same plan, and but for what scheduling makes of it. With other times, phases turn at other moments and
    other sequences meet in a batch: in one of some thousand jobs like these, P4->D4 with 2 sequences a replica took
    another transition on twice the bandwidth, and 16 % more time. No static plan among them lost anything."""
    node, base = job.hardware, simulate(job.setup, job.hardware, job.workload).seconds
    for better in (
        {"bandwidth": 2 * node.bandwidth},
        {"flops": {name: 2 * rate for name, rate in node.flops.items()}},
        {"all_reduce": {n: faster(c) for n, c in node.all_reduce.items()}, "send": faster(node.send)},
        {
            name: 2 * getattr(node, name)
            for name in ("to_host", "to_device", "node_to_host", "node_to_device")
        },
    ):
        seconds = simulate(job.setup, msgspec.structs.replace(node, **better), job.workload).seconds
        assert seconds <= base * (1.2 if job.setup.plan.separate else 1.01), better


@pytest.mark.parametrize("plan", ["P4->T4", "T4", "P4", "D4"])
def test_no_job_beats_its_arithmetic(plan: str) -> None:
    """Everything is divided over four ranks at best."""
    prompts, outputs = (sum(values) for values in zip(*LENGTHS, strict=True))
    layer = 1024 * 2048 + 1024 * 1024 + 3 * 1024 * 2816
    kept = 1024 * 1024
    flops = 2 * ((prompts + outputs - len(LENGTHS)) * 7 * layer + prompts * kept + outputs * (layer - kept))
    assert run(plan).seconds > flops / 4e12


def test_slow_links_are_what_re_sharding_is_for() -> None:
    """With memory for a few sequences: pipelines prefill better, tensor parallelism decodes better."""
    slow = {
        "all_reduce": {n: line(2e-5, 4e7 / n) for n in (2, 4, 8)},
        "send": line(2e-5, 4e7),
        "bandwidth": 2e9,
    }
    limits = {"max_running": 16, "chunk": 128}
    rates = {plan: run(plan, slow, **limits).rate for plan in ("P4->T4", "T4", "P4", "T2P2")}
    assert max(rates, key=lambda plan: rates[plan]) == "P4->T4", rates


@pytest.mark.parametrize("plan", ["P4->T4", "T4", "T2P2"])
def test_better_hardware_is_not_slower(plan: str) -> None:
    base = run(plan).seconds
    for better in (
        {"bandwidth": 4e10},
        {"flops": {"bfloat16": 4e12}},
        {"all_reduce": {n: line(1e-6, 1e10) for n in (2, 4, 8)}, "send": line(1e-6, 1e10)},
        {"node_to_device": 4e10, "node_to_host": 4e10, "to_device": 1e10, "to_host": 1e10},
    ):
        assert run(plan, better).seconds <= base * 1.001, better


def test_transitions_take_what_their_bytes_take() -> None:
    delta, resident = (
        run("P4->T4", transition=mode, device_memory=800 << 20) for mode in ("delta", "resident")
    )
    assert delta.transitions == resident.transitions > 0
    each = setup("P4->T4", transition="delta")
    executor = simulated_executor(each, hardware())
    moved = executor._moves.transition_bytes[1]
    assert moved == pytest.approx(0.75 * each.model.weight_bytes(), rel=0.02)
    assert delta.seconds - resident.seconds >= 0.9 * delta.transitions * max(
        executor._moves.transition_seconds[1]
    )


def test_what_is_computed_again_is_counted() -> None:
    """Long answers that nobody expects, and no host buffer to park them in: their tokens are fed again."""
    limits = Limits(device_memory=340 << 20, host_kv=0, max_model_len=400, chunk=64, max_running=24)
    one = set_up(model(), Plan.parse("T1"), "bfloat16", limits)
    lengths = [(20, 300)] * 24
    found = simulate(one, hardware(), lengths)
    assert found.recomputed > 0 and found.swapped_out == 0
    assert found.output_tokens == 24 * 300
    assert found.phases["mixed"].tokens > 24 * 319
    check_accounts(found)


def test_a_job_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty workload"):
        simulate(setup("T4"), hardware(), [])


def test_requests_that_cannot_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="512"):
        simulate(setup("T4"), hardware(), [(600, 2)])


# ---- arrivals --------------------------------------------------------------------------------------------------


def arriving(*times: float, prompt: int = 100, output: int = 5) -> Workload:
    count = len(times)
    return Workload("arriving", np.full(count, prompt), np.full(count, output), np.array(times))


def test_the_clock_jumps_to_the_next_arrival() -> None:
    """Three requests far apart: each is served alone, and in between the node is idle."""
    each = simulate(setup("T4"), hardware(), [(100, 5)])
    found = simulate(setup("T4"), hardware(), arriving(10.0, 20.0, 30.0))
    assert found.seconds == pytest.approx(30.0 + each.seconds)
    assert found.phases["mixed"].causes["idle"] == pytest.approx(30.0 - 2 * each.seconds)
    assert found.latency is not None
    assert found.latency.end_to_end == pytest.approx(dict.fromkeys((50, 90, 99), each.seconds), rel=0.006)
    first = simulate(setup("T4"), hardware(), [(100, 1)])
    assert found.latency.ttft[99] == pytest.approx(first.seconds, rel=0.006)
    gap = (each.seconds - first.seconds) / 4
    assert found.latency.inter_token[50] == pytest.approx(gap, rel=0.006)


@pytest.mark.parametrize("plan", ["P4->T4", "P4->P4"])
def test_phases_turn_instead_of_waiting_for_the_future(plan: str) -> None:
    each = simulate(setup(plan), hardware(), [(100, 5)])
    found = simulate(setup(plan), hardware(), arriving(0.0, 1000.0))
    assert found.latency is not None
    assert found.latency.end_to_end[50] == pytest.approx(each.seconds, rel=0.006)
    assert found.seconds < 1000.0 + 3 * each.seconds


def test_an_idle_replica_takes_what_arrives() -> None:
    """The other replica is in the middle of a long prompt."""
    long = simulate(setup("D2"), hardware(), [(400, 1)]).seconds
    short = simulate(setup("D2"), hardware(), [(8, 1)]).seconds
    lengths = np.array([400, 8])
    work = Workload("two", lengths, np.array([1, 1]), np.array([0.0, long / 4]))
    found = simulate(setup("D2"), hardware(), work)
    assert long / 4 + short < long
    assert found.seconds == pytest.approx(long)


def test_nobody_waits_for_latencies_that_are_not_asked_for() -> None:
    assert run("T4").latency is None


def test_traces_bring_their_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,ContextTokens,GeneratedTokens\n0.5,100,5\n0.25,60,3\n")
    found = simulate(setup("T2"), hardware(), workload(trace))
    assert found.latency is not None and found.prompt_tokens == 160 and found.seconds > 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1.0,100,5\nsoon,100,5", "line 3: arrived_at is 'soon'; expected seconds"),
        ("1.0,100,5\n2.0,100,", "line 3: GeneratedTokens is ''; expected a whole number"),
        ("-1,100,5", "line 2: arrived_at is '-1'; expected seconds, at least 0"),
        ("1.0,0,5", "line 2: ContextTokens is '0'"),
        ("", "empty workload"),
    ],
)
def test_malformed_traces_say_where(tmp_path: Path, rows: str, message: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(f"arrived_at,ContextTokens,GeneratedTokens\n{rows}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        workload(trace)


# ---- phases and causes -----------------------------------------------------------------------------------------


def test_phases_are_those_of_the_plan() -> None:
    assert list(run("T4").phases) == ["mixed"]
    assert list(run("P4->P4").phases) == ["prefill", "decode"]
    found = run("P4->T4")
    assert sorted(found.phases) == ["decode", "prefill", "transition"]
    assert found.phases["transition"].seconds > 0 and found.phases["transition"].forwards == 0
    prompts = sum(prompt for prompt, _ in LENGTHS)
    assert found.phases["prefill"].tokens == prompts
    assert found.phases["decode"].tokens == sum(output - 1 for _, output in LENGTHS)
    assert found.phases["prefill"].causes["bubble"] > 0 and found.phases["decode"].causes["all_reduce"] > 0


def test_without_re_sharding_a_phase_ends_with_its_last_forward() -> None:
    """One prompt and one step under a pipeline: the turn is when the last stage is through with the prompt."""
    alone = simulate(setup("P4->P4"), hardware(), [(300, 1)])
    found = simulate(setup("P4->P4"), hardware(), [(300, 2)])
    assert found.phases["prefill"].seconds == pytest.approx(alone.seconds)
    assert (found.phases["prefill"].forwards, found.phases["decode"].forwards) == (1, 1)


def test_waits_are_counted_as_the_engine_counts_them() -> None:
    """There, a pipeline drains in prefill, and a transition is what is left of it after the last Forward."""
    found = run("P4->T4")
    assert sum(found.waited.values()) == pytest.approx(found.seconds)
    assert found.waited["prefill"] > found.phases["prefill"].seconds
    assert found.waited["transition"] < found.phases["transition"].seconds
    still = run("P4->P4")
    assert sorted(still.waited) == ["decode", "prefill"]
    assert still.waited["prefill"] == pytest.approx(still.phases["prefill"].seconds, rel=0.1)
    assert run("T4").waited == {"mixed": pytest.approx(run("T4").seconds)}


def test_slow_copies_show() -> None:
    """With a host link a thousand times slower, steps wait for KV and little else."""
    slow = dict.fromkeys(("to_host", "to_device", "node_to_host", "node_to_device"), 4e6)
    fast, found = run("T4->T4"), run("T4->T4", slow)
    assert fast.phases["decode"].causes["swap"] < 0.2 * fast.seconds
    assert found.phases["decode"].causes["swap"] > 0.8 * found.seconds


def test_other_replicas_at_work_are_no_bubble() -> None:
    """One request on two replicas of one rank: one of them has nothing to do."""
    phase = simulate(setup("D2"), hardware(), [(300, 5)]).phases["mixed"]
    assert phase.causes["idle"] == pytest.approx(phase.seconds / 2)
    assert phase.causes["bubble"] == pytest.approx(0.0, abs=1e-12)


def test_the_host_buffer_fills_and_drains() -> None:
    found = simulate(setup("P4->T4"), hardware(), [(40 + i % 9, 20 + i % 50) for i in range(3000)])
    times, shares = zip(*found.buffer, strict=True)
    assert len(times) <= 240 and list(times) == sorted(times) and times[-1] == found.seconds
    assert max(later - time for time, later in pairwise(times)) < 0.05 * found.seconds
    assert max(shares) > 0.95 and min(shares) == 0.0
    assert run("T4", host_kv=0).buffer == ()


# ---- links -----------------------------------------------------------------------------------------------------


def moves(plan: str, planned: PlannedModel, **node: Any) -> Moves:
    limits = Limits(device_memory=480 << 20, host_kv=64 << 20, max_model_len=512)
    each = set_up(planned, Plan.parse(plan), "bfloat16", limits)
    return simulated_executor(each, hardware(**node))._moves


def test_ranks_share_what_the_node_gives() -> None:
    """A block of 16 tokens x 16 KiB, each rank its part of it, at 4 GB/s for the node and 2 GB/s for a rank."""
    found = moves("P4->T4", model())
    assert found.block_bytes == 16 * 2 * 8 * 512 * 2
    assert found.to_host == pytest.approx((found.block_bytes / 4e9,) * 2)
    assert moves("T1->T1", model()).to_device == pytest.approx((found.block_bytes / 2e9,) * 2)
    assert moves("D4->T4", model()).to_device[0] == pytest.approx(found.block_bytes / 1e9)


def test_replicated_heads_are_read_by_all_and_written_once() -> None:
    """Two KV heads on four ranks: each rank reads half a block, two of them write it at 2 GB/s each."""
    found = moves("T4->T4", model(kv_heads=2))
    assert found.to_device[0] == pytest.approx(found.block_bytes / 2 / 1e9)
    assert found.to_host[0] == pytest.approx(found.block_bytes / 2 / 2e9)
