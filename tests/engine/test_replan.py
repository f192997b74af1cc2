"""`plan="auto"` on real ranks: started at the first rows, changed in the middle of a job; always the same tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seesaw import LLM, Request, RequestOutput, SamplingParams, auto
from seesaw.auto import Auto
from seesaw.core.errors import EngineError, RequestError
from seesaw.core.layout import Plan
from seesaw.deployment import Deployment, redeploy
from seesaw.planning.setup import Limits
from seesaw.rows import Rows
from seesaw.scheduling.policies.phased import PhasedPolicy
from seesaw.scheduling.scheduler import Scheduler
from tests.engine.small_node import CONFIG, SMALL, VOCAB, node, rows, said
from tests.engine.test_lifecycle import workers_of

ROWS, LONG = 60, 24

Tokens = dict[str, list[int]]


def prompts() -> list[dict[str, Any]]:
    return [{"prompt_token_ids": r.prompt_token_ids} for r in rows(ROWS, 1)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What a plan that is given generates, by request id."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    roomy = {"device_memory": "8MiB", "host_kv": "8MiB", "max_running": 64, "chunk": 512}
    with LLM(folder, plan="P2->T2", tokenizer=False, **(SMALL | roomy)) as llm:
        return {o.request_id: o.outputs[0].token_ids for o in llm.run(rows(ROWS, LONG))}


def cut(tokens: list[int], row: int) -> tuple[int, list[int]]:
    """A token that ends a row after a few, and what is generated up to it."""
    stop = tokens[1 + row % 2]
    return stop, tokens[: tokens.index(stop) + 1]


def short_rows(answers: Tokens) -> Iterator[Request]:
    """Rows that may generate many tokens and end after two or three."""
    for i, request in enumerate(rows(ROWS, LONG)):
        stop, _ = cut(answers[request.id], i)
        sampling = SamplingParams(temperature=0, max_tokens=LONG, stop_token_ids=(stop,), ignore_eos=True)
        yield Request(id=request.id, prompt_token_ids=request.prompt_token_ids, sampling=sampling)


def check_short(outputs: list[RequestOutput], answers: Tokens) -> None:
    assert sorted(int(o.request_id) for o in outputs) == list(range(ROWS))
    for output in outputs:
        assert output.error is None
        assert output.outputs[0].token_ids == cut(answers[output.request_id], int(output.request_id))[1]


@pytest.mark.parametrize(("policy", "then"), [(None, "P2"), ("seesaw", "P2->P2")])
def test_a_job_goes_on_under_another_plan(
    policy: str | None,
    then: str,
    model: Path,
    measured: Callable[..., Path],
    answers: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured()
    monkeypatch.setattr(auto, "ENOUGH_FINISHED", 10)
    with LLM(model, ranks=2, policy=policy, tokenizer=False, **SMALL) as llm:
        outputs, plans = [], []
        for output in llm.run(short_rows(answers)):
            outputs.append(output)
            plans.append(llm.stats().plan)
        stats = llm.stats()
        # it serves again, under the plan that it came to
        again = list(llm.run(rows(8, LONG)))
    check_short(outputs, answers)
    assert {o.request_id: o.outputs[0].token_ids for o in again} == {
        str(i): answers[str(i)] for i in range(8)
    }
    assert (plans[0], plans[-1]) == ("P2->T2", then)
    assert stats.requests_finished == ROWS and stats.prompt_tokens == ROWS * 60
    assert stats.output_tokens == sum(len(o.outputs[0].token_ids) for o in outputs)
    assert {"prefill", "decode", "transition"} <= set(stats.seconds_per_phase) and stats.transitions
    assert stats.preemptions_recomputed == 0
    first, second, *_ = said(caplog)
    assert first.startswith("plan auto: P2->T2, chunk 32 (predicted")
    assert "not 24 as assumed; from P2->T2 to " + then in second


class Changing(Auto):
    """Goes from P2->T2 to a plan of the test's choice the first time that it can."""

    target = ""

    def choose(self, rows: Rows) -> Deployment:
        rows.look_ahead(1)
        self.settled = True
        return self._fallback

    def wants_another(self, scheduler: Scheduler) -> bool:
        policy = scheduler.policy
        return bool(self.target) and isinstance(policy, PhasedPolicy) and policy.turns_back(scheduler)

    def again(self, present: Deployment, scheduler: Scheduler, left: int | None, cost: float) -> Deployment:
        """Asserts what the engine promises of this moment."""
        self.residents = sum(replica.resident for replica in scheduler.replicas)
        assert scheduler.waiting and not scheduler.hosted and left is not None and cost > 0
        plan, self.target = Plan.parse(self.target), ""
        limits = Limits(
            device_memory=present.device_memory,
            host_kv=present.host_kv,
            chunk=32,
            max_running=16,
            max_model_len=128,
        )
        return redeploy(present, plan, limits)


@pytest.mark.parametrize("target", ["T2", "P2", "T2->P2"])
def test_sequences_under_way_are_taken_along(
    target: str, model: Path, answers: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When half of a batch has ended, the rest is parked in the middle of its output, and goes on elsewhere."""
    made: list[Changing] = []

    def changing(deployment: Deployment) -> Auto:
        made.append(Changing(deployment, node()))
        made[0].target = target
        return made[0]

    monkeypatch.setattr("seesaw.llm.auto_for", changing)
    lengths = [2 + 7 * i % (LONG - 2) for i in range(ROWS)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    with LLM(model, ranks=2, tokenizer=False, **SMALL) as llm:
        outputs = llm.generate(prompts(), params)
        stats = llm.stats()
    assert isinstance(outputs, list)
    assert [o.outputs[0].token_ids for o in outputs] == [answers[str(i)][:n] for i, n in enumerate(lengths)]
    assert stats.plan == target and made[0].residents > 0
    assert stats.preemptions_swapped >= made[0].residents and stats.preemptions_recomputed == 0


def test_ranks_start_with_the_first_rows(model: Path, measured: Callable[..., Path], answers: Tokens) -> None:
    measured()
    before = len(workers_of(os.getpid()))
    pulled = 0

    def source() -> Iterator[dict[str, Any]]:
        nonlocal pulled
        for prompt in prompts() * 20:
            pulled += 1
            yield prompt

    with LLM(model, ranks=2, tokenizer=False, **SMALL) as llm:
        assert llm.stats().plan == "auto" and llm.stats().phase == "idle"
        assert llm.max_model_len == 128
        outputs = iter(
            llm.generate(source(), SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True))
        )
        assert pulled == 0 and len(workers_of(os.getpid())) <= max(before, 1)
        first = [next(outputs) for _ in range(20)]
        assert auto.FIRST_ROWS <= pulled < 700
        assert llm.stats().plan == "P2->T2" and llm.stats().start_seconds > 0
        outputs.close()  # type: ignore[attr-defined]
    assert [o.outputs[0].token_ids for o in first] == [answers[str(i)] for i in range(20)]


def test_it_can_be_closed_before_it_starts(model: Path, measured: Callable[..., Path]) -> None:
    measured()
    with LLM(model, ranks=2, tokenizer=False, **SMALL) as llm:
        assert llm.generate([], SamplingParams(temperature=0)) == []
        assert llm.stats().requests_finished == 0 and llm.stats().plan == "auto"
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate([[3, 4]], SamplingParams(temperature=0))


def test_a_short_job_first_does_not_decide_for_the_next(
    model: Path, measured: Callable[..., Path], answers: Tokens
) -> None:
    measured()
    few = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM(model, ranks=2, tokenizer=False, **SMALL) as llm:
        llm.generate(prompts()[:1], few)
        assert llm.stats().plan == "P2->T2"
        outputs = llm.generate(prompts(), few)
        assert llm.stats().plan == "P2"
        with pytest.raises(RequestError, match="prompt 0"):
            llm.generate([[VOCAB]], few)
    assert isinstance(outputs, list)
    assert [o.outputs[0].token_ids for o in outputs] == [answers[str(i)][:3] for i in range(ROWS)]
