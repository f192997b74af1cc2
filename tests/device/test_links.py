"""What is made for messages beforehand is what a job uses: NCCL has communicators for those alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from seesaw import LLM, SamplingParams, launch
from seesaw.deployment import Deployment
from seesaw.execution import worker as worker_module
from seesaw.transport import select
from seesaw.transport.base import Link, Members, Transport
from tests.device.ranks import watched
from tests.engine.conftest import write_model


class Recorded:
    """A transport that tells of its groups and messages."""

    def __init__(self, inner: Transport, rank: int, groups: set[Members], links: set[Link]) -> None:
        self._inner, self._rank, self._groups, self._links = inner, rank, groups, links
        self.name = inner.name

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        self._groups.add(members)
        return self._inner.all_reduce(x, members)

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        self._groups.add(members)
        return self._inner.gather(x, members)

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        self._groups.add(members)
        return self._inner.broadcast(x, members)

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        self._links.add((self._rank, rank, channel))
        self._inner.send(x, rank, channel)

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        self._links.add((rank, self._rank, channel))
        return self._inner.receive(x, rank, channel)

    def flush(self) -> None:
        self._inner.flush()

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("plan", ["P2", "T2", "P2->T2", "P2->P2", "D2P2", "P4->D2P2", "P2T2->P2T2"])
def test_a_job_uses_what_was_made(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    made: list[tuple[set[Members], set[Link]]] = []
    groups: set[Members] = set()
    links: set[Link] = set()

    def create(*arguments: Any, **options: Any) -> Transport:
        made.append((set(options["groups"]), set(options["links"])))
        inner = select.create_transport(*arguments, **options)
        return Recorded(inner, options["rank"], groups, links)

    options: dict[str, Any] = {
        "device_memory": "4MiB",
        "host_kv": "2MiB",
        "max_model_len": 96,
        "max_running": 4,
    }
    with watched(monkeypatch) as _, monkeypatch.context() as patch:
        patch.setattr(worker_module, "create_transport", create)
        with LLM(
            tmp_path, plan=plan, load_format="dummy", dtype="float32", tokenizer=False, **options
        ) as llm:
            prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 200 for j in range(20)]} for i in range(8)]
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
            world = llm.deployment.plan.world
    assert len(made) == world and all(each == made[0] for each in made)  # the same on every rank
    assert {group for group in groups if len(group) > 1} <= made[0][0]
    assert links <= made[0][1]
    unused = made[0][1] - links
    assert all(channel == 1 for _, _, channel in unused), unused
    if (
        not plan.startswith("P") or "->" not in plan
    ):  # of layouts that only prefill, tokens go straight to the control
        assert not unused


@pytest.mark.parametrize("plan", ["P2->T2", "P2T2->P4"])
def test_a_job_over_the_lanes_gives_the_same_answers(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ranks over NCCL's class, with Gloo in its place."""
    write_model(tmp_path)
    options: dict[str, Any] = {"device_memory": "4MiB", "host_kv": "2MiB", "max_model_len": 96}

    def answers() -> list[list[int]]:
        with LLM(
            tmp_path, plan=plan, load_format="dummy", dtype="float32", tokenizer=False, **options
        ) as llm:
            taken.append(llm.deployment.own_transport)
            prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 200 for j in range(20)]} for i in range(8)]
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
            return [list(output.outputs[0].token_ids) for output in outputs]

    taken: list[str | None] = []
    expected = answers()
    monkeypatch.setattr(Deployment, "own_transport", "nccl")
    connected = launch.resolve_kind
    monkeypatch.setattr(launch, "resolve_kind", lambda *a, **k: taken.append(connected(*a, **k)) or taken[-1])
    assert answers() == expected
    assert taken == [None, "nccl", "nccl"]
