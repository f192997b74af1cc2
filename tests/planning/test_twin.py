"""The twin: the same actions as the engine's ranks, every token, and what physics demands."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from seesaw.bench.shapes import model_directory
from seesaw.core.actions import Action, Completion, CopiesDone, Forward, Transition
from seesaw.core.errors import RequestError
from seesaw.core.layout import Plan
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.deployment import Deployment, Options, resolve
from seesaw.engine import Engine
from seesaw.execution.base import Executor
from seesaw.launch import start_local
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.twin import Simulated, simulate, simulated_executor
from tests.planning.machines import SPEC, hardware, line, model

LENGTHS = [(1 + i * 37 % 400, 1 + i * 11 % 60) for i in range(80)]


def setup(plan: str, **changes: Any) -> Setup:
    limits: dict[str, Any] = {"device_memory": 480 << 20, "host_kv": 64 << 20, "max_model_len": 512}
    return set_up(SPEC, Plan.parse(plan), "bfloat16", Limits(**(limits | changes)))


def run(plan: str, node: dict[str, Any] | None = None, **changes: Any) -> Simulated:
    return simulate(setup(plan, **changes), model(), hardware(**(node or {})), LENGTHS)


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


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("plan", ["P2->T2", "T2->D2", "T2", "D2"])
def test_both_executors_are_told_the_same(plan: str, overlap: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        deployment = resolve(
            Options(
                model=str(model_directory("tiny", Path(folder) / "model")),
                plan=plan,
                load_format="dummy",
                dtype="float32",
                device_memory="96MiB",
                host_kv="2MiB",
                max_running=6,
                chunk=64,
                overlap=overlap,
                max_model_len=128,
            )
        )
        real = actions_of(deployment, start_local(deployment))
    planned = PlannedModel(name="tiny", spec=deployment.spec, weight_bits=32, kv_bits=32)
    simulated = actions_of(deployment, simulated_executor(deployment.setup, planned, hardware()))
    assert simulated == real
    assert len(real) > 20 and any(isinstance(a, Transition) for a in real) == deployment.plan.reshards


@pytest.mark.parametrize("plan", ["P4->T4", "D2P2->T4", "T2P2->D2T2", "P4->P4", "T4", "P4", "D4"])
def test_every_token_and_the_same_every_time(plan: str) -> None:
    found = run(plan)
    assert found.prompt_tokens == sum(prompt for prompt, _ in LENGTHS)
    assert found.recomputed == 0 and found.output_tokens == sum(output for _, output in LENGTHS)
    assert sum(found.phase_seconds.values()) == pytest.approx(found.seconds)
    assert run(plan) == found


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
    executor = simulated_executor(each, model(), hardware())
    moved = executor._moves.transition_bytes[1]
    assert moved == pytest.approx(0.75 * sum(each.memory.weights), rel=0.2)
    assert delta.seconds - resident.seconds >= 0.9 * delta.transitions * max(
        executor._moves.transition_seconds[1]
    )


def test_requests_that_cannot_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="512"):
        simulate(setup("T4"), model(), hardware(), [(600, 2)])
