"""Ranks that are killed, that hang, that raise, in the middle of a job: the others go on, with the same tokens."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from seesaw import LLM, Request
from seesaw.core.actions import SwapIn
from seesaw.core.errors import ConfigError, WorkerError
from seesaw.core.layout import Layout
from seesaw.deployment import Deployment
from seesaw.elastic import plans
from seesaw.execution.liveness import Liveness
from seesaw.launch import LocalNode
from tests.engine.conftest import write_model
from tests.engine.small_node import SMALL, rows
from tests.engine.test_lifecycle import ranks_of

COUNT, LONG = 120, 24
ROOMY = SMALL | {"device_memory": "4MiB"}
"""One rank alone can hold the model."""

Tokens = dict[str, list[int]]


def job() -> Iterator[Request]:
    return rows(COUNT, LONG)


@contextmanager
def engine(model: Path, plan: str, **options: Any) -> Iterator[tuple[LLM, list[psutil.Process]]]:
    """An engine and its workers, by rank."""
    before = ranks_of(os.getpid())
    with LLM(model, plan=plan, tokenizer=False, **(ROOMY | options)) as llm:
        yield llm, [p for p in ranks_of(os.getpid()) if p not in before]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What a run that nothing disturbs generates."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    with LLM(folder, plan="P2->T2", tokenizer=False, **ROOMY) as llm:
        return {o.request_id: o.outputs[0].token_ids for o in llm.run(job())}


def check(outputs: list[Any], answers: Tokens) -> None:
    assert sorted(int(o.request_id) for o in outputs) == list(range(COUNT))
    assert all(o.error is None and o.outputs[0].token_ids == answers[o.request_id] for o in outputs)


def kill_after(outputs: Iterator[Any], moments: dict[int, list[psutil.Process]]) -> list[Any]:
    """Take all outputs; when so many have come, the processes named are killed."""
    taken = []
    for output in outputs:
        taken.append(output)
        for process in moments.get(len(taken), []):
            process.kill()
    return taken


@pytest.mark.parametrize(
    ("plan", "transport"),
    [
        ("P2->T2", "shm"),
        ("T2", "gloo"),
        pytest.param("D2", "shm", marks=pytest.mark.slow),
        pytest.param("P2->P2", "gloo", marks=pytest.mark.slow),
    ],
)
def test_one_of_two(plan: str, transport: str, model: Path, answers: Tokens) -> None:
    with engine(model, plan, transport=transport) as (llm, workers):
        outputs = kill_after(llm.run(job()), {7: [workers[1]]})
        stats = llm.stats()
        again = list(llm.run(rows(5, LONG)))
    check(outputs, answers)
    (loss,) = stats.rank_losses
    assert (loss.ranks, loss.before) == ((1,), plan)
    assert loss.after == stats.plan == ("T1" if plan in ("T2", "D2") else "T1->T1")
    assert "rank 1" in loss.reason and "ended without a word" in loss.reason
    assert loss.kept + loss.restarted > 0 and loss.seconds > 0
    assert [o.outputs[0].token_ids for o in again] == [answers[o.request_id] for o in again]


@pytest.mark.parametrize(
    "plan", ["P4->T4", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("D2P2->D2T2", "T4"))]
)
def test_four_two_one(plan: str, model: Path, answers: Tokens) -> None:
    """The second loss is of a rank that was started after the first."""
    with engine(model, plan) as (llm, workers):
        taken, killed = [], False
        for output in llm.run(job()):
            taken.append(output)
            if len(taken) == 5:
                workers[0].kill()
                workers[2].kill()
            elif len(taken) >= 20 and llm.stats().rank_losses and not killed:
                ranks_of(os.getpid())[-1].kill()
                killed = True
        stats = llm.stats()
        world = llm.deployment.plan.world
    check(taken, answers)
    lost = sum(len(loss.ranks) for loss in stats.rank_losses)
    assert len(stats.rank_losses) >= 2 and world == 4 - lost, stats.rank_losses


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_at_any_moment(seed: int, model: Path, answers: Tokens) -> None:
    rng = random.Random(seed)
    plan, ranks = rng.choice((("P2->T2", 2), ("P4->T4", 4), ("D2->T2", 2)))
    with engine(model, plan) as (llm, workers):
        timer = threading.Timer(rng.uniform(0.0, 0.6), workers[rng.randrange(ranks)].kill)
        timer.start()
        outputs = list(llm.run(job()))
        timer.cancel()
    check(outputs, answers)


def test_a_rank_that_hangs(model: Path, answers: Tokens) -> None:
    with engine(model, "P2->T2", rank_timeout=2.0) as (llm, workers):
        outputs = []
        for output in llm.run(job()):
            outputs.append(output)
            if len(outputs) == 3:
                workers[0].suspend()
        (loss,) = llm.stats().rank_losses
    check(outputs, answers)
    assert loss.ranks == (0,) and "gave no sign of life for 2 s" in loss.reason
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_rank_that_dies_as_it_starts(model: Path, answers: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    start, deaths = LocalNode.start, [(2,), (0,)]

    def dying(self: LocalNode, deployment: Deployment) -> None:
        start(self, deployment)
        if deaths:
            lost = deaths.pop(0)
            raise WorkerError(f"ranks {lost} ended", rank=lost[0], phase="startup", lost=lost)

    monkeypatch.setattr(LocalNode, "start", dying)
    with engine(model, "P4->T4") as (llm, _):
        first, second = llm.stats().rank_losses
        outputs = list(llm.run(job()))
    assert (first.before, first.after, second.after) == ("P4->T4", "P3->T3", "P2->T2")
    assert (first.kept, first.restarted) == (0, 0)
    check(outputs, answers)


def test_a_rank_that_dies_before_it_has_work(model: Path, answers: Tokens) -> None:
    """Nothing can be sent to it any more."""
    with engine(model, "P2->T2") as (llm, workers):
        workers[0].kill()
        psutil.wait_procs(workers[:1], timeout=10)
        time.sleep(0.3)  # until its connection is seen to be gone
        outputs = list(llm.run(job()))
        (loss,) = llm.stats().rank_losses
    assert loss.ranks == (0,)
    check(outputs, answers)


def test_no_layout_is_left(model: Path) -> None:
    """Half of the model fits a rank, the whole does not."""
    with engine(model, "P2->T2", **SMALL) as (llm, workers):
        with pytest.raises(WorkerError, match="1 rank is left, on which no plan has room") as caught:
            kill_after(llm.run(job()), {3: [workers[1]]})
        assert "rank 1" in str(caught.value)
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_stop(model: Path) -> None:
    with engine(model, "P2->T2", on_rank_loss="stop") as (llm, workers):
        with pytest.raises(WorkerError, match=r"rank 0 .* ended without a word") as caught:
            kill_after(llm.run(job()), {3: [workers[0]]})
        assert caught.value.lost == (0,)
    with pytest.raises(ConfigError, match="on_rank_loss 'wait': choose one of continue, stop"):
        LLM(model, plan="T1", on_rank_loss="wait", **ROOMY)


def test_an_error_that_would_come_again_stops(model: Path) -> None:
    """A rank that raises is not a rank that is lost: the same batch would end the next one too."""
    with engine(model, "T2") as (llm, _):
        with pytest.raises(WorkerError, match=r"rank [01] failed during swap-in") as caught:
            for _ in llm.run(job()):
                llm._node.submit(SwapIn(10**6, 0, [(10**6, 0)]))
        assert caught.value.lost == ()


def test_plans_for_the_ranks_that_are_left() -> None:
    assert [str(plan) for plan in plans(2, separate=True)][:3] == ["P2->T2", "D2->T2", "T2->T2"]
    assert [str(plan) for plan in plans(4, separate=False)][:2] == ["T4", "D2T2"]
    for ranks in range(1, 9):
        every = Layout.all(ranks)
        assert len(set(every)) == len(every) and all(layout.world == ranks for layout in every)
        assert len(set(plans(ranks, separate=True))) == len(every) ** 2


def test_silence_counts_only_while_somebody_listens() -> None:
    liveness = Liveness(2, timeout=5.0, now=0.0)
    liveness.looked(100.0)  # the control process was stopped
    liveness.heard(0, "decode")
    for second in range(101, 105):
        liveness.heard(1, "prefill")
        liveness.looked(float(second))
    with pytest.raises(
        WorkerError, match="rank 0 gave no sign of life for 5 s, last during decode"
    ) as caught:
        for second in range(105, 110):
            liveness.heard(1, "prefill")
            liveness.looked(float(second))
    assert caught.value.lost == (0,)
