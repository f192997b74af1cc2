"""`plan="auto"`: what is chosen by the first rows, and what is left alone. No rank is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seesaw import LLM, Request, SamplingParams
from seesaw.auto import FIRST_ROWS, Auto, auto_for
from seesaw.core.actions import DECODE
from seesaw.core.errors import ConfigError, LayoutError, ModelError
from seesaw.core.hardware import HardwareSpec
from seesaw.deployment import Deployment, resolve
from seesaw.options import Options
from seesaw.rows import Counted, Rows
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from tests.engine.small_node import SMALL, rows, said


def chooser(model: Path, **options: Any) -> Auto:
    """Of an engine that starts no ranks."""

    deployment = resolve(Options(model=str(model), **(SMALL | {"ranks": 2} | options)))
    found = auto_for(deployment)
    assert found is not None
    return found


# ---- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "plan"), [(60, "P2->T2"), (3, "P2")])
def test_lengths_decide(
    output: int, plan: str, model: Path, measured: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    measured()
    found = chooser(model).choose(Rows(list(rows(100, output))))
    assert str(found.plan) == plan
    (message,) = said(caplog)
    assert message.startswith(f"plan auto: {plan}, chunk 32 (predicted ")
    assert ("best static T2 with" in message) == (plan == "P2->T2")


def test_what_the_user_fixed_stays(model: Path, measured: Callable[..., Path]) -> None:
    measured()
    fixed: dict[str, Any] = {"chunk": 40, "max_running": 7, "policy": "seesaw", "transition": "reload"}
    found = chooser(model, seed=5, overlap=False, **fixed).choose(Rows(rows(100, 60)))
    config = found.scheduler
    assert str(found.plan) == "P2->T2" and config.policy == "seesaw"
    assert (config.max_batch_tokens, config.max_running, config.max_model_len) == (40, 7, 128)
    assert (found.memory.mode, config.seed, config.overlap) == ("reload", 5, False)
    assert config.turn_costs is not None


@pytest.mark.parametrize(("policy", "plan"), [("seesaw", "P2->P2"), ("chunked", "P2"), (None, "P2")])
def test_a_policy_rules_plans_out(
    policy: str | None, plan: str, model: Path, measured: Callable[..., Path]
) -> None:
    measured()
    assert str(chooser(model, policy=policy).choose(Rows(rows(100, 3))).plan) == plan


def test_what_is_free_is_chosen(model: Path, measured: Callable[..., Path]) -> None:
    measured()
    found = chooser(model, chunk=None, max_running=None, device_memory="4MiB").choose(Rows(rows(100, 3)))
    assert found.scheduler.max_batch_tokens >= 256 and found.scheduler.max_running >= 64


def test_a_job_of_a_moment_is_not_planned_and_settles_nothing(
    model: Path, measured: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    measured()
    auto = chooser(model)
    assert str(auto.choose(Rows(rows(2, 3))).plan) == "P2->T2"
    assert str(auto.choose(Rows(rows(3, 3))).plan) == "P2->T2"
    assert not auto.settled and len(said(caplog)) == 1 and "too short" in said(caplog)[0]
    assert str(auto.choose(Rows(rows(100, 3))).plan) == "P2" and auto.settled


def test_rows_that_cannot_be_served_do_not_count(model: Path, measured: Callable[..., Path]) -> None:
    measured()
    sampling = SamplingParams(temperature=0, max_tokens=60)
    bad = [Request(id=str(i), prompt_token_ids=(3,) * n, sampling=sampling) for i, n in enumerate((0, 500))]
    auto = chooser(model)
    assert str(auto.choose(Rows(bad)).plan) == "P2->T2" and not auto.settled
    assert str(auto.choose(Rows([*bad, *rows(100, 3)])).plan) == "P2"


def test_memory_that_bounds_the_context_leaves_a_choice(model: Path, measured: Callable[..., Path]) -> None:
    """All that fits under one plan would rule out every other."""
    measured()
    auto = chooser(model, max_model_len=None)
    assert (
        resolve(
            Options(model=str(model), **(SMALL | {"ranks": 2, "max_model_len": None}))
        ).memory.max_model_len
        > 128
    )
    found = auto.choose(Rows(rows(100, 3)))
    assert str(found.plan) == "P2" and found.memory.max_model_len >= 2 * 63


# ---- the fixed rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({"ranks": 4}, {}, "another number of ranks (4, not 2)"),
        ({"device": "cuda"}, {}, "another device (cuda, not cpu)"),
        ({"flops": {"bfloat16": 1e9}}, {}, "has bfloat16 only, not float32"),
        ({}, {"ranks": 1, "device_memory": "4MiB"}, "one rank leaves little to choose"),
    ],
)
def test_without_a_profile_that_fits_the_rule_decides(
    changes: dict[str, Any],
    options: dict[str, Any],
    why: str,
    model: Path,
    measured: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured(**changes)
    deployment = resolve(Options(model=str(model), **(SMALL | {"ranks": 2} | options)))
    assert auto_for(deployment) is None
    (message,) = said(caplog)
    assert why in message and f"plan auto: {deployment.plan} by rule" in message
    assert ("`seesaw profile`" in message) == (deployment.plan.world > 1)


def test_a_profile_of_another_machine_or_none_or_a_broken_one(
    model: Path, measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def why() -> object:
        return resolve(Options(model=str(model), **(SMALL | {"ranks": 2}))).hardware

    assert "there is no profile at" in str(why())
    path = measured()
    assert isinstance(why(), HardwareSpec)
    path.write_text(path.read_text().replace('"machine": "', '"machine": "not-'))
    assert "another machine (not-" in str(why())
    path.write_text("{")
    assert "is not a profile" in str(why())


@pytest.mark.parametrize("plan", ["P2->T2", "T2"])
def test_a_given_plan_gets_its_costs_and_no_planner(
    plan: str, model: Path, measured: Callable[..., Path]
) -> None:
    def costs() -> object:
        deployment = resolve(Options(model=str(model), plan=plan, **SMALL))
        assert auto_for(deployment) is None
        return deployment.scheduler.turn_costs

    assert costs() is None
    measured()
    assert (costs() is not None) == (plan == "P2->T2")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nowhere"}, ModelError),
        ({"chunk": 0}, ConfigError),
        ({"policy": "fifo"}, ConfigError),
        ({"dtype": "int3"}, ConfigError),
        ({"device_memory": "1KiB"}, ConfigError),
        ({"no_such": 1}, ConfigError),
        ({"plan": "P2->T3"}, LayoutError),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], model: Path, measured: Callable[..., Path]
) -> None:
    measured()
    with pytest.raises(error):
        LLM(**(SMALL | {"model": model, "ranks": 2, "tokenizer": False} | options))


# ---- rows -------------------------------------------------------------------------------------------------------


def test_rows_are_looked_at_and_not_lost() -> None:
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in rows(1000, 3):
            pulled += 1
            yield request

    some = Rows(Counted(source(), range(1000)))
    assert some.left == 1000 and pulled == 0
    assert [r.id for r in some.look_ahead(FIRST_ROWS)] == [str(i) for i in range(FIRST_ROWS)]
    assert pulled == FIRST_ROWS and some.left == 1000 and not some.ended
    assert next(some).id == "0" and some.left == 999 and pulled == FIRST_ROWS
    assert [r.id for r in some] == [str(i) for i in range(1, 1000)]
    assert some.ended and some.left == 0


@pytest.mark.parametrize(
    ("of", "left"), [(range(1000), 1000), (iter(range(1000)), 1000), ((i for i in range(9)), None)]
)
def test_what_is_left_is_told_where_it_is_known(of: Any, left: int | None) -> None:
    assert Rows(Counted(rows(1000, 3), of)).left == left


def test_a_source_of_unknown_length_is_taken_for_a_long_one(
    model: Path, measured: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    measured()
    auto = chooser(model)
    sampling = SamplingParams(temperature=0, max_tokens=2)

    def endless() -> Iterator[Request]:
        while True:
            yield Request(id="0", prompt_token_ids=(3,), sampling=sampling)

    some = Rows(endless())
    assert some.left is None
    auto.choose(some)
    assert auto.settled and not some.ended and next(some).id == "0"


# ---- again ------------------------------------------------------------------------------------------------------


def under_way(model: Path, outputs: list[int]) -> tuple[Auto, Deployment, Scheduler]:
    """A job planned for 24 tokens each, of which `outputs` have ended and 60 rows wait."""
    auto = chooser(model)
    present = auto.choose(Rows(rows(60, 24)))
    assert str(present.plan) == "P2->T2"
    scheduler = Scheduler(present.scheduler, create_policy(present.scheduler))
    for request in rows(60, 24):
        scheduler.add(request, frozenset())
    for request, output in zip(rows(len(outputs), 24), outputs, strict=True):
        (sequence,) = scheduler.add(request, frozenset())
        sequence.tokens.extend([3] * output)
        scheduler.finish(sequence, "stop")
        auto.finished(sequence)
    return auto, present, scheduler


@pytest.mark.parametrize(
    ("outputs", "wants"), [([3] * 63, False), ([3] * 64, True), ([17] * 80, False), ([15] * 80, True)]
)
def test_another_plan_is_wanted_when_enough_is_far_off(
    outputs: list[int], wants: bool, model: Path, measured: Callable[..., Path]
) -> None:
    measured()
    auto, _, scheduler = under_way(model, outputs)
    assert not auto.wants_another(scheduler)  # it prefills
    scheduler.transition(DECODE)
    assert auto.wants_another(scheduler) == wants


@pytest.mark.parametrize(
    ("left", "cost", "plan"), [(0, 1.0, "P2"), (None, 1.0, "P2"), (0, 1e6, None), (2000, 300.0, "P2")]
)
def test_another_plan_must_be_worth_its_start(
    left: int | None,
    cost: float,
    plan: str | None,
    model: Path,
    measured: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured()
    auto, present, scheduler = under_way(model, [3] * 64)
    scheduler.transition(DECODE)
    found = auto.again(present, scheduler, left, cost)
    assert (None if found is None else str(found.plan)) == plan
    assert "not 24 as assumed" in said(caplog)[1]
    assert ("P2->T2 stays" in said(caplog)[1]) == (plan is None)
    assert not auto.wants_another(scheduler), "what was observed is what is assumed now"
    if found is not None:
        assert found.memory.host_blocks == present.memory.host_blocks
        assert found.memory.max_model_len == present.memory.max_model_len


def test_the_same_lengths_are_not_worth_a_change(
    model: Path, measured: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A search that only finds what is running leaves it alone."""
    measured()
    auto, present, scheduler = under_way(model, [24] * 64)
    scheduler.transition(DECODE)
    assert auto.again(present, scheduler, 0, 0.0) is None
    assert "P2->T2 stays" in said(caplog)[1]
