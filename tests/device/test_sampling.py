"""Tokens that are drawn, penalised and looked up on a device with streams: those of CPU ranks, and nothing races."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seesaw import LLM, SamplingParams
from seesaw.device.cuda import CudaStream
from tests.device.ranks import watched
from tests.device.test_order import MEMORY, PROMPTS, SHAPE
from tests.engine.small_node import SMALL

Patch = pytest.MonkeyPatch
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.01, "presence_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 0, "min_tokens": 3},
    {"temperature": 1.0},
    {"temperature": 0.0},
]


def answers(folder: Path, plan: str) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Tokens and log-probabilities of prompts of all kinds."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    options: dict[str, Any] = {**SMALL, "device_memory": MEMORY[plan], "host_kv": "96KiB"}
    params = [
        SamplingParams(seed=i, max_tokens=16, ignore_eos=True, **KINDS[i % len(KINDS)])
        for i in range(len(PROMPTS))
    ]
    with LLM(str(folder), plan=plan, tokenizer=False, attention="torch", **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
        return [
            (
                list(output.token_ids),
                [{token: one.logprob for token, one in place.items()} for place in output.logprobs or []],
            )
            for output in outputs
        ]


@pytest.mark.parametrize("plan", ["P2->T2", "T1->T1"])
def test_a_job_of_all_kinds_gets_the_answers_of_cpu_ranks(
    plan: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Through transitions and preemption: histories go on where they were.

    Steps may be divided into batches otherwise, so that log-probabilities differ in their last bits.
    """
    expected = answers(tmp_path, plan)
    with watched(monkeypatch) as watch:
        found = answers(tmp_path, plan)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, here), (_, there) in zip(found, expected, strict=True):
        assert len(here) == len(there)
        for place, other in zip(here, there, strict=True):
            assert place == pytest.approx(other, abs=1e-5)
    assert watch.cuda.races == set()
    assert any(logprobs for _, logprobs in found)


def test_a_report_that_does_not_wait_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    """Of tokens and of log-probabilities, which have to arrive first."""

    def notify(self: CudaStream, call: Callable[[], None]) -> None:
        call()

    with watched(monkeypatch) as watch:
        monkeypatch.setattr(CudaStream, "notify", notify)
        answers(tmp_path, "T2")
    assert {race.rpartition(": ")[2] for race in watch.cuda.races} == {"tokens", "log-probabilities"}
