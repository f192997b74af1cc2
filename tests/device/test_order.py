"""The order of copies and computation on a device with streams: nothing may race, and a missing wait is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seesaw import LLM, SamplingParams
from seesaw.core.stats import EngineStats
from seesaw.device.base import Event
from seesaw.device.cuda import CudaStream
from seesaw.execution.kv_copies import KvCopies, Table
from seesaw.kv.copy_engine import CopyEngine
from tests.device.ranks import watched
from tests.engine.small_node import CONFIG, SMALL

PROMPTS = [[3 + (7 * i + 3 * j) % 250 for j in range(20 + 5 * i)] for i in range(8)]
SHAPE: dict[str, Any] = {**CONFIG, "num_hidden_layers": 2}
MEMORY = {"T1->T1": "400KiB", "P2->T2": "300KiB", "P2->D2": "400KiB", "T2": "250KiB"}
"""So narrow that sequences are swapped out and weights change more than once."""

Patch = pytest.MonkeyPatch


def answers(
    folder: Path, plan: str, prompts: int = len(PROMPTS), tokens: int = 20, **changes: Any
) -> tuple[list[list[int]], EngineStats]:
    """So many tokens of so many prompts under `plan`."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    options: dict[str, Any] = {**SMALL, "device_memory": MEMORY[plan], "host_kv": "96KiB"} | changes
    with LLM(str(folder), plan=plan, tokenizer=False, attention="torch", **options) as llm:
        outputs = llm.generate(PROMPTS[:prompts], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs], llm.stats()


@pytest.mark.parametrize("plan", MEMORY)
def test_a_job_has_no_races(plan: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Prefill with KV written through, preemption, transitions, copies in beside decode steps."""
    expected, _ = answers(tmp_path, plan)
    with watched(monkeypatch) as watch:
        found, stats = answers(tmp_path, plan)
    assert found == expected
    assert watch.cuda.races == set()
    if "->" in plan:
        assert stats.swapped_out_bytes and stats.swapped_in_bytes
    if plan[0] == "P":
        assert len(stats.transitions) > 1


def no_event_before_copies(patch: Patch) -> None:
    """Copies do not wait for the computation before them."""
    patch.setattr(CudaStream, "after", lambda self, event: None)


def reports_without_waiting(patch: Patch) -> None:
    """What was launched is taken for done."""

    def notify(self: CudaStream, call: Callable[[], None]) -> None:
        call()

    patch.setattr(CudaStream, "notify", notify)


def copies_reported_without_waiting(patch: Patch) -> None:
    """The same for copies alone."""
    whole = CudaStream.notify

    def notify(self: CudaStream, call: Callable[[], None]) -> None:
        if "computation" in self.native.actor.name:
            whole(self, call)
        else:
            call()

    patch.setattr(CudaStream, "notify", notify)


def event_of_the_wrong_moment(patch: Patch) -> None:
    """Copies wait for the event that the copy before them should have waited for."""
    whole, last = CudaStream.after, dict[int, Event]()

    def after(self: CudaStream, event: Event) -> None:
        if id(self) in last:
            whole(self, last[id(self)])
        last[id(self)] = event

    patch.setattr(CudaStream, "after", after)


def transition_without_fence(patch: Patch) -> None:
    """The pool is viewed anew while copies of the old view are under way, which nobody has been told are done."""
    patch.setattr(CopyEngine, "fence", lambda self: None)


def block_tables_of_the_compute_stream(patch: Patch) -> None:
    """They are made when copies are submitted: where computation may use their memory again at once."""
    whole = KvCopies._table

    def table(self: KvCopies, pairs: list[tuple[int, int]]) -> Table:
        later = whole(self, pairs)
        later()
        return later

    patch.setattr(KvCopies, "_table", table)


@pytest.mark.parametrize(
    ("broken", "plan"),
    [
        (no_event_before_copies, "P2->D2"),
        (reports_without_waiting, "P2->T2"),
        (copies_reported_without_waiting, "P2->T2"),
        (copies_reported_without_waiting, "P2->D2"),
        (event_of_the_wrong_moment, "P2->T2"),
        (transition_without_fence, "P2->D2"),
        (block_tables_of_the_compute_stream, "P2->D2"),
    ],
)
def test_a_missing_wait_is_found(
    broken: Callable[[Patch], None], plan: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Each of the waits, taken away, is a race."""
    with watched(monkeypatch) as watch:
        broken(monkeypatch)
        answers(tmp_path, plan)
    assert watch.cuda.races
    if broken is block_tables_of_the_compute_stream:
        assert all(race.endswith("block table") for race in watch.cuda.races)
