"""Decode steps captured as graphs: whole jobs give the same answers, nothing races, and mistakes are found."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.device.cuda import CudaDevice, CudaGraph, CudaGraphPool
from seesaw.execution import graphs as graphs_module
from seesaw.execution.graphs import VARIABLE, StaticInputs, Step
from tests.device.races import FakeStream
from tests.device.ranks import captured
from tests.device.test_order import answers

Patch = pytest.MonkeyPatch


LADDER = (3, 7, 16)
"""So that most batches are padded, however copies happen to make them up."""


def noted(patch: Patch) -> list[tuple[int, int]]:
    """Sequences of each step that is run as a graph of `LADDER`, and to how many it is padded."""
    steps: list[tuple[int, int]] = []
    fill = StaticInputs.fill

    def note(self: StaticInputs, size: int, tokens: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
        steps.append((len(tokens), size))
        return fill(self, size, tokens, *rest)

    patch.setattr(StaticInputs, "fill", note)
    patch.setattr(graphs_module, "graph_batches", lambda most: LADDER)
    return steps


@pytest.mark.parametrize("plan", ["P2->T2", "P2->D2", "T2"])
def test_a_job_by_graphs_gives_the_same_answers(plan: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Batches that grow and shrink, sequences of different lengths, KV that comes and goes beside the steps, weights
    that change in between: on every stage, on every rank of a group, with stages behind others."""
    expected, _ = answers(tmp_path, plan)
    steps = noted(monkeypatch)
    with captured(monkeypatch) as watch:
        found, stats = answers(tmp_path, plan)
    assert found == expected
    assert watch.cuda.races == set()
    assert len(watch.cuda.replays) == len(steps) > 20
    assert {size for _, size in steps} <= set(LADDER)
    assert any(count < size for count, size in steps)
    assert len(set(watch.cuda.replays)) < 0.5 * len(steps)  # each is used many times
    if "->" in plan:
        assert stats.swapped_in_bytes


def failing(patch: Patch, ranks: set[int], *, at: int) -> None:
    """On these ranks the capture number `at` finds an operator that waits for the device."""
    capture, tried = CudaGraphPool.capture, dict[str, int]()

    def capturing(self: CudaGraphPool, work: Callable[[], object]) -> CudaGraph:
        name = threading.current_thread().name
        tried[name] = tried.get(name, -1) + 1
        fails = name in {f"rank {rank}" for rank in ranks} and tried[name] == at
        runs = []

        def once() -> None:
            work()
            runs.append(None)
            if fails and len(runs) == 2:
                torch.zeros(1).item()

        return capture(self, once)

    patch.setattr(CudaGraphPool, "capture", capturing)


@pytest.mark.parametrize("at", [0, 1])
def test_what_cannot_be_captured_on_one_rank_runs_without_graphs_on_all(
    at: int, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """The group agrees, or its collectives would never meet; the user is told once, by the rank that knows why."""
    expected, _ = answers(tmp_path, "T2")
    steps = noted(monkeypatch)
    with captured(monkeypatch) as watch, caplog.at_level(logging.INFO, "seesaw.execution.graphs"):
        failing(monkeypatch, {1}, at=at)
        found, _ = answers(tmp_path, "T2")
    assert found == expected and watch.cuda.races == set()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    assert "cannot be captured (RuntimeError: CUDA error: operation not permitted" in warnings[0]
    assert "SEESAW_CUDA_GRAPHS=0" in warnings[0]
    assert sum("another rank of the group" in r.getMessage() for r in caplog.records) == 1
    assert not steps and not watch.cuda.replays  # the second capture is of what the first step needs


def test_a_capture_that_failed_is_not_tried_under_later_shardings(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = answers(tmp_path, "P2->T2")
    with captured(monkeypatch) as watch:
        failing(monkeypatch, {0, 1}, at=0)
        found, _ = answers(tmp_path, "P2->T2")
    assert found == expected and not watch.cuda.replays
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 2  # one of each rank


def test_the_environment_turns_graphs_off(tmp_path: Path, monkeypatch: Patch) -> None:
    expected, _ = answers(tmp_path, "T2")
    monkeypatch.setenv(VARIABLE, "0")
    with captured(monkeypatch) as watch:
        assert answers(tmp_path, "T2")[0] == expected
    assert not watch.cuda.replays


@pytest.mark.parametrize(("transition", "memory"), [("resident", "420KiB"), ("delta", "300KiB")])
def test_graphs_go_with_the_weights_they_were_captured_over(
    transition: str, memory: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Weights that stay resident keep their graphs; others must be free before a transition takes their memory,
    which the worker checks by its ledger."""
    pools: list[CudaGraphPool] = []
    make = CudaDevice.graph_pool

    def graph_pool(self: CudaDevice) -> CudaGraphPool:
        pools.append(make(self))
        return pools[-1]

    options = {"transition": transition, "device_memory": memory}
    expected, _ = answers(tmp_path, "P2->T2", **options)
    with captured(monkeypatch) as watch:
        monkeypatch.setattr(CudaDevice, "graph_pool", graph_pool)
        found, stats = answers(tmp_path, "P2->T2", **options)
    assert found == expected and watch.cuda.races == set()
    phases = (len(stats.transitions) + 1) // 2
    assert phases and watch.cuda.replays
    assert len(pools) == (2 if transition == "resident" else 2 * phases)


# ---- mistakes in the order of work -------------------------------------------------------------------------------


def inputs_on_another_stream(patch: Patch) -> None:
    """A step's inputs are put in while the replay before may still read its own."""
    put = StaticInputs._put

    def elsewhere(self: StaticInputs, *arguments: Any) -> Tensor:
        found: list[Tensor] = []
        self._device.to_device.launch(lambda: found.append(put(self, *arguments)))
        return found[0]

    patch.setattr(StaticInputs, "_put", elsewhere)


def output_on_another_stream(patch: Patch) -> None:
    """What a replay leaves is taken away by a copy that nobody waits for."""
    run = Step.run
    streams: dict[int, FakeStream] = {}

    def elsewhere(self: Step) -> Tensor:
        hidden = run(self)
        cuda = self.graph._stream._api  # type: ignore[attr-defined]
        stream = streams.setdefault(id(self.graph._stream), cuda.Stream(hidden.device))  # type: ignore[attr-defined]
        with cuda.stream(stream):
            return hidden.clone()

    patch.setattr(Step, "run", elsewhere)


def warm_up_without_waiting(patch: Patch) -> None:
    """Capturing reads inputs that may not have come yet."""
    wait = FakeStream.wait_event

    def unless_capturing(self: FakeStream, event: Any) -> None:
        if self.actor.number not in capturing:
            wait(self, event)

    capturing: set[int] = set()
    pool = CudaDevice.graph_pool

    def graph_pool(self: CudaDevice) -> CudaGraphPool:
        made = pool(self)
        capturing.add(made._native.actor.number)
        return made

    patch.setattr(FakeStream, "wait_event", unless_capturing)
    patch.setattr(CudaDevice, "graph_pool", graph_pool)


@pytest.mark.parametrize("plan", ["T2", "P2->D2"])
@pytest.mark.parametrize(
    "broken", [inputs_on_another_stream, output_on_another_stream, warm_up_without_waiting]
)
def test_a_missing_wait_is_found(
    broken: Callable[[Patch], None], plan: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    with captured(monkeypatch) as watch:
        broken(monkeypatch)
        answers(tmp_path, plan)
    assert any("static" in race for race in watch.cuda.races), watch.cuda.races
