"""Log-probabilities of prompts equal those of transformers, whatever the plan and however prompts are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesaw import LLM, RequestOutput, SamplingParams
from seesaw.core.errors import ConfigError, RequestError
from tests.checkpoints import make_checkpoint, reference_model

LONGEST, CHUNK = 128, 24
LENGTHS = (2, 3, 24, 25, 26, 48, 49, 127, 90, 17)
ONLY_SCORES = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=3)

Case = tuple[Path, list[list[int]], list[Tensor]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint whose 263 tokens no number of ranks divides, prompts, and every position's log-probabilities."""
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=LONGEST)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(263, (n,), generator=generator).tolist() for n in (*LENGTHS, LONGEST + 1)]
    model = reference_model(path)
    with torch.inference_mode():
        tables = [model(torch.tensor([p[:LONGEST]])).logits[0].log_softmax(dim=-1) for p in prompts]
    return path, prompts, tables


def engine(path: Path, plan: str, **options: object) -> LLM:
    """Few sequences at once, in a pool that the longest one fills if it is alone."""
    settings = {"max_running": 3, "block_size": 8, "chunk": CHUNK, "host_kv": "1MiB", **options}
    return LLM(path, plan=plan, dtype="float32", device_memory="12MiB", tokenizer=False, **settings)


def given(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def check(output: RequestOutput, table: Tensor, first: int = 1, top: int = 3) -> None:
    """Against rows of log-probabilities, one for each token of the prompt but the first."""
    prompt, scored = output.prompt_token_ids, output.prompt_logprobs
    assert scored is not None and len(scored) == len(prompt)
    assert scored[:first] == [None] * first
    for token, row, entries in zip(prompt[first:], table[first - 1 :], scored[first:], strict=False):
        assert entries is not None and next(iter(entries)) == token
        assert entries[token].logprob == pytest.approx(row[token].item(), rel=1e-4, abs=1e-3)
        assert entries[token].rank == int((row > row[token]).sum()) + 1
        best = row.topk(top)
        assert set(entries) == {token, *best.indices.tolist()}
        for other, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert entries[other].logprob == pytest.approx(logprob, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("plan", ["T2", "P2", "D2", "P2->T2"])
def test_scores_equal_transformers(case: Case, plan: str) -> None:
    """The longest prompt has a token more than the model sees at once."""
    path, prompts, tables = case
    with engine(path, plan) as llm:
        assert llm.max_model_len == LONGEST
        outputs = llm.generate(given(prompts), ONLY_SCORES)
        assert llm.stats().transitions == ()
    for output, table in zip(outputs, tables, strict=True):
        check(output, table)
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "length")


def test_scored_and_other_prompts_share_batches(case: Case) -> None:
    """Beside requests that want no scores, or only some; tokens are those of a run without."""
    path, prompts, tables = case
    prompts, tables = prompts[:-1], tables[:-1]
    kinds: list[dict[str, int]] = [
        {},
        {"prompt_logprobs": 0, "prompt_logprobs_start": 20},
        {"prompt_logprobs": 3, "n": 2},
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **kinds[i % 3])
        for i in range(len(prompts))
    ]
    with engine(path, "T2", max_running=6) as llm:
        plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        expected = [o.outputs[0].token_ids for o in llm.generate(given(prompts), plain)]
        outputs = llm.generate(given(prompts), params)
    for i, (output, table) in enumerate(zip(outputs, tables, strict=True)):
        assert [o.token_ids for o in output.outputs] == [expected[i]] * len(output.outputs)
        if i % 3 == 0:
            assert output.prompt_logprobs is None
        elif i % 3 == 1:
            check(output, table, first=min(20, len(prompts[i])), top=0)
        else:
            check(output, table)


def test_what_cannot_be_scored_is_said(case: Case) -> None:
    path, prompts, _ = case
    with engine(path, "T1") as llm:
        with pytest.raises(RequestError, match="129 tokens; at most 127 fit"):
            llm.generate(given(prompts), SamplingParams(max_tokens=1, prompt_logprobs=0))
        with pytest.raises(RequestError, match="130 tokens; at most 129 fit"):
            llm.generate([[5] * 130], ONLY_SCORES)
        with pytest.raises(RequestError, match="one token has nothing to score"):
            llm.generate([[5]], ONLY_SCORES)
    with pytest.raises(RequestError, match="max_tokens=0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(RequestError, match="max_tokens=0"):
        SamplingParams(max_tokens=0, prompt_logprobs=1, n=2)
    with pytest.raises(RequestError, match="prompt_logprobs=21"):
        SamplingParams(prompt_logprobs=21)
    assert not issubclass(RequestError, ConfigError)
