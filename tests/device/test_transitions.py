"""Weights that come on a stream of their own, beside the last micro-batches: no race, and each wait is needed."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from seesaw import LLM, SamplingParams
from seesaw.core.stats import EngineStats
from seesaw.device.base import Event
from seesaw.device.cuda import CudaStream
from seesaw.execution.stage import Stage
from seesaw.execution.worker import Worker
from seesaw.models.decoder import Decoder
from seesaw.weights.arrivals import EMBEDDING, HEAD, Arrivals
from seesaw.weights.changes import Mode
from seesaw.weights.reshard import RankWeights
from tests.device.ranks import watched
from tests.engine.small_node import CONFIG, SMALL

PROMPTS = [[3 + (7 * i + 3 * j) % 250 for j in range(20 + 5 * i)] for i in range(6)]
SAMPLING = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SHAPE: dict[str, Any] = {**CONFIG, "num_hidden_layers": 3}
MODES: tuple[Mode, ...] = ("resident", "delta", "reload")
Patch = pytest.MonkeyPatch


def answers(folder: Path, plan: str, mode: Mode, layers: int = 3) -> tuple[list[list[int]], EngineStats]:
    """Tokens of all prompts; the host buffer is so small that the ranks change more than once."""
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    options: dict[str, Any] = {**SMALL, "device_memory": "1MiB", "host_kv": "96KiB", "transition": mode}
    with LLM(str(folder), plan=plan, tokenizer=False, attention="torch", **options) as llm:
        assert any(llm.deployment.shardings[0].carried) == (plan == "P2->T2" and layers == 4)
        outputs = llm.generate(PROMPTS, SAMPLING)
        return [list(output.outputs[0].token_ids) for output in outputs], llm.stats()


@cache
def expected_of(plan: str, layers: int) -> list[list[int]]:
    """Of CPU ranks, which are processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return answers(Path(folder), plan, "delta", layers)[0]


@pytest.mark.parametrize(("plan", "layers"), [("P2->T2", 3), ("T2->P2", 3), ("P2->T2", 4)])
@pytest.mark.parametrize("mode", MODES)
def test_a_job_with_transitions_has_no_races(
    mode: Mode, plan: str, layers: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Of four layers, the stages of prefill share an FFN."""
    expected = expected_of(plan, layers)
    with watched(monkeypatch) as watch:
        found, stats = answers(tmp_path, plan, mode, layers)
    assert found == expected
    assert watch.cuda.races == set()
    assert len(stats.transitions) > 1
    # each stretch of copies takes a millisecond by the device's events, in this file's GPU
    stretches = 1 if mode == "resident" else 2
    assert {change.moving_seconds for change in stats.transitions} == {stretches * 1e-3}


def scores(folder: Path) -> list[Any]:
    """Log-probabilities of prompts, some of which are scored right behind a transition."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    options: dict[str, Any] = {**SMALL, "device_memory": "1MiB", "host_kv": "96KiB", "transition": "reload"}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    with LLM(str(folder), plan="P2->T2", tokenizer=False, attention="torch", **options) as llm:
        outputs = llm.generate(PROMPTS, params)
        assert len(llm.stats().transitions) > 1
    return [
        at[token].logprob
        for output in outputs
        for token, at in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
        if at is not None
    ]


def test_prompts_are_scored_by_weights_that_have_come(tmp_path: Path, monkeypatch: Patch) -> None:
    expected = scores(tmp_path)
    with watched(monkeypatch) as watch:
        found = scores(tmp_path)
        assert watch.cuda.races == set()
        await_ = Stage._await
        monkeypatch.setattr(
            Stage, "_await", lambda self, group: None if group == HEAD else await_(self, group)
        )
        scores(tmp_path)
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == sum(map(len, PROMPTS)) - len(PROMPTS)
    assert watch.cuda.races


def computation_before_its_weights(patch: Patch) -> None:
    """Forwards do not wait for their weights."""
    patch.setattr(Arrivals, "before", lambda self, group: None)


def layers_before_their_last_tensor(patch: Patch) -> None:
    """They wait for the first tensor of each layer."""
    whole = Arrivals.launched

    def launched(self: Arrivals, tensor: str, event: Event) -> None:
        if reshard_group(tensor) not in self._events:
            whole(self, tensor, event)

    patch.setattr(Arrivals, "launched", launched)


def reshard_group(tensor: str) -> int:
    """Of a device tensor."""
    from seesaw.weights.arrivals import _group

    return _group(tensor)


def the_embedding_is_not_waited_for(patch: Patch) -> None:
    """Layers are."""
    whole = Arrivals.before
    patch.setattr(Arrivals, "before", lambda self, group: None if group == EMBEDDING else whole(self, group))


def memory_that_is_still_read(patch: Patch) -> None:
    """What the last micro-batches read is freed and written while they run."""
    patch.setattr(RankWeights, "_behind_computation", lambda self: None)


def weights_on_the_compute_streams_memory(patch: Patch) -> None:
    """They are allocated on another stream than the one that writes them."""
    whole = RankWeights._run

    def run(self: RankWeights, changes: Any, *given: Any, **named: Any) -> Any:
        if any(named.values()):
            with patch.context() as inner:
                inner.setattr(self._device, "weights", Lying(self._device.weights, self._device.compute))
                return whole(self, changes, *given, **named)
        return whole(self, changes, *given, **named)

    patch.setattr(RankWeights, "_run", run)


class Lying:
    """A stream whose work goes to another one."""

    def __init__(self, stream: CudaStream, other: CudaStream) -> None:
        self._stream, self._other = stream, other

    def launch(self, work: Callable[[], object]) -> None:
        """See `Stream.launch`."""
        self._other.launch(work)

    def record(self) -> Event:
        """See `Stream.record`."""
        return self._stream.record()


def reported_when_launched(patch: Patch) -> None:
    """A transition is reported without waiting for anything."""
    transition, notify = Worker._transition, CudaStream.notify
    here = threading.local()  # ranks are threads, and only those in a transition do not wait

    def hurried(self: Worker, action: Any) -> None:
        here.hurried = True
        transition(self, action)
        here.hurried = False

    def told(stream: CudaStream, call: Callable[[], None]) -> None:
        if getattr(here, "hurried", False):
            call()
        else:
            notify(stream, call)

    patch.setattr(Worker, "_transition", hurried)
    patch.setattr(CudaStream, "notify", told)


def reported_before_the_old_work_is_done(patch: Patch) -> None:
    """As soon as the weights are there."""
    whole = CudaStream.after

    def after(self: CudaStream, event: Event) -> None:
        if not (self._thread.name == "seesaw-weights" and event._stream._thread.name == "seesaw-compute"):  # type: ignore[attr-defined]
            whole(self, event)

    patch.setattr(CudaStream, "after", after)


@pytest.mark.parametrize(
    ("broken", "plan", "mode"),
    [
        *((computation_before_its_weights, "P2->T2", mode) for mode in MODES),
        (layers_before_their_last_tensor, "P2->T2", "resident"),
        (layers_before_their_last_tensor, "P2->T2", "delta"),
        (the_embedding_is_not_waited_for, "P2->T2", "reload"),
        (memory_that_is_still_read, "P2->T2", "delta"),
        (memory_that_is_still_read, "T2->P2", "reload"),
        (weights_on_the_compute_streams_memory, "P2->T2", "delta"),
        (reported_when_launched, "P2->T2", "delta"),
        (reported_before_the_old_work_is_done, "P2->T2", "resident"),
    ],
)
def test_a_missing_wait_is_found(
    broken: Callable[[Patch], None], plan: str, mode: Mode, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Each of the waits, taken away, is a race."""
    with watched(monkeypatch) as watch:
        broken(monkeypatch)
        answers(tmp_path, plan, mode)
    assert watch.cuda.races


@pytest.mark.parametrize("mode", ["delta", "reload"])
def test_an_ffn_that_stages_share_is_waited_for(mode: Mode, tmp_path: Path, monkeypatch: Patch) -> None:
    """By the second of them as well, which has nothing else of its layer."""
    whole = Decoder.layers

    def layers(self: Decoder, *given: Any, before_layer: Callable[[int], None] | None, **named: Any) -> Any:
        def before(layer: int) -> None:
            if layer in self._view.layers and before_layer is not None:
                before_layer(layer)

        return whole(self, *given, before_layer=before, **named)

    with watched(monkeypatch) as watch:
        monkeypatch.setattr(Decoder, "layers", layers)
        answers(tmp_path, "P2->T2", mode, layers=4)
    assert watch.cuda.races
