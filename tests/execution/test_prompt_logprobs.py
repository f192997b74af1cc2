"""`PromptScorer` on ranks that share a vocabulary: every way to cut rows and tokens gives what the whole table
says."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.core.actions import Forward, ForwardDone, PromptScore
from seesaw.device.select import open_device
from seesaw.execution import prompt_logprobs
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.prompt_logprobs import PromptScorer, with_prompt_logprobs
from tests.execution.test_stage import _Threads

VOCAB, COUNTS = 23, [4, 1, 6]
SCORES = [PromptScore(0, 1, [3, 22], 2), PromptScore(2, 0, [0, 7, 8, 15, 16, 7], 5)]
ROWS = [1, 2, 5, 6, 7, 8, 9, 10]
"""Packed rows of the tokens before those of `SCORES`."""


def forward() -> Forward:
    total = sum(COUNTS)
    plain: dict[str, Any] = {
        "open": [],
        "close": [],
        "new_blocks": [],
        "write_through": [],
        "feedback": False,
    }
    return Forward(
        id=1,
        replica=0,
        slots=[0, 1, 2],
        starts=[0, 3, 0],
        counts=COUNTS,
        tokens=[0] * total,
        sampled=[1],
        feedback_from=-1,
        scores=SCORES,
        **plain,
    )


def scored(logits: Tensor, parts: list[range], seen: list[int]) -> ForwardDone:
    """What ranks with these parts of the vocabulary say; the hidden states are the logits themselves."""
    boxes: list[list[queue.Queue[Tensor]]] = [[queue.Queue() for _ in parts] for _ in parts]
    device = open_device("cpu")
    scorers = []
    for rank, part in enumerate(parts):
        view: Any = SimpleNamespace(vocab=part, tp_ranks=tuple(range(len(parts))))
        group = TensorParallelGroup(view, _Threads(rank, boxes))

        def of_part(hidden: Tensor, part: range = part) -> Tensor:
            seen.append(len(hidden))
            return hidden[:, part.start : part.stop].contiguous()

        scorers.append(PromptScorer(VOCAB, group, device, of_part))
    with ThreadPoolExecutor(len(parts)) as threads:
        answers = list(threads.map(lambda one: one.score(forward(), logits), scorers))
    assert answers[1:] == [None] * (len(parts) - 1)
    assert answers[0] is not None
    return with_prompt_logprobs(lambda: ForwardDone(1, [4], []), answers[0], SCORES)


@pytest.mark.parametrize(
    "parts", [[range(23)], [range(12), range(12, 23)], [range(1), range(1, 20), range(20, 23)]]
)
@pytest.mark.parametrize(("rows", "elements"), [(100, 1 << 22), (3, 1 << 22), (3, 1)])
@pytest.mark.parametrize("kind", ["plain", "equal", "bfloat16", "large"])
def test_parts_score_as_the_whole(
    parts: list[range], rows: int, elements: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_logprobs, "logit_rows", lambda vocab: rows)
    monkeypatch.setattr(prompt_logprobs, "_CHUNK_ELEMENTS", elements)
    logits = torch.randn(sum(COUNTS), VOCAB, generator=torch.Generator().manual_seed(1))
    if kind == "equal":
        logits = logits.round()  # many tokens have the same logit
    elif kind == "large":
        logits = logits * 300  # exponentials overflow float32
    if kind == "bfloat16":
        logits = logits.bfloat16()
    seen: list[int] = []
    done = scored(logits, parts, seen)
    assert done.tokens == [4] and max(seen) <= rows and sum(seen) == len(ROWS) * len(parts)
    wanted = [(token, score.top) for score in SCORES for token in score.tokens]
    table = logits[ROWS].double().log_softmax(dim=-1)
    for row, raw, (token, top), found in zip(table, logits[ROWS], wanted, done.prompt_logprobs, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), rel=1e-5, abs=1e-5)
        assert found.rank == int((raw > raw[token]).sum()) + 1
        best = raw.float().sort(descending=True, stable=True).indices[:top].tolist()
        assert [other for other, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx(row[best].tolist(), rel=1e-5, abs=1e-5)


def test_more_most_likely_tokens_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SCORES", [PromptScore(0, 0, [3], 2), PromptScore(2, 0, [9], 23)])
    logits = torch.randn(sum(COUNTS), VOCAB, generator=torch.Generator().manual_seed(2))
    done = scored(logits, [range(2), range(2, 23)], [])
    assert [len(one.top) for one in done.prompt_logprobs] == [2, 23]
    assert sorted(token for token, _ in done.prompt_logprobs[1].top) == list(range(23))
