"""Decode steps captured as graphs: whole jobs give the same answers, nothing races, and mistakes are found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.core.workspace import graph_batches
from seesaw.device.base import CaptureError
from seesaw.device.cuda import CudaDevice, CudaGraph, CudaGraphPool
from seesaw.execution import graphs as graphs_module
from seesaw.execution.graphs import DecodeGraphs, StaticInputs, Step, StepFields
from seesaw.execution.stage import Stage
from seesaw.execution.worker import Worker
from tests.device.captures import FakeGraph
from tests.device.races import FakeCuda, FakeStream
from tests.device.ranks import captured
from tests.device.test_order import MEMORY, answers

Patch = pytest.MonkeyPatch


def noted(patch: Patch) -> list[tuple[int, int]]:
    """Sequences of each step that is run as a graph, and to how many it is padded."""
    steps: list[tuple[int, int]] = []
    fill = StaticInputs.fill

    def note(self: StaticInputs, size: int, tokens: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
        steps.append((len(tokens), size))
        return fill(self, size, tokens, *rest)

    patch.setattr(StaticInputs, "fill", note)
    return steps


@pytest.mark.parametrize("plan", MEMORY)
def test_a_job_by_graphs_gives_the_same_answers(plan: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Batches that grow and shrink, sequences of different lengths, KV that comes and goes beside the steps, weights
    that change in between: on every stage, on every rank of a group, with stages behind others."""
    expected, _ = answers(tmp_path, plan)
    steps = noted(monkeypatch)
    with captured(monkeypatch) as watch:
        found, stats = answers(tmp_path, plan)
    assert found == expected
    assert watch.cuda.races == set()
    assert len(watch.cuda.replays) == len(steps) > 60
    sizes = {size for _, size in steps}
    assert len(sizes) >= 3 and sizes <= set(graph_batches(16))
    assert any(count < size for count, size in steps) and any(count == size for count, size in steps)
    assert len(set(watch.cuda.replays)) < 0.3 * len(steps)  # each is used many times
    if "->" in plan:
        assert stats.swapped_in_bytes


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
