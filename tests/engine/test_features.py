"""Sampling, stop strings, `n`, log-probabilities and chat through the whole engine, on the example's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seesaw import LLM, RequestOutput, SamplingParams
from seesaw.core.errors import ConfigError, RequestError

EXTRACT = Path(__file__).parents[2] / "examples" / "extract"


def messages(count: int) -> list[list[dict[str, str]]]:
    """The first conversations of the example's job file."""
    lines = (EXTRACT / "orders.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["body"]["messages"] for line in lines]


def answers(count: int) -> list[str]:
    lines = (EXTRACT / "orders.expected.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["answer"] for line in lines]


def engine(plan: str) -> LLM:
    return LLM(
        EXTRACT / "model", plan=plan, dtype="float32", device_memory="24MiB", host_kv="2MiB", max_running=8
    )


def chat(plan: str, params: SamplingParams, count: int = 12) -> list[RequestOutput]:
    with engine(plan) as llm:
        return list(llm.chat(messages(count), params))


def test_orders_are_read() -> None:
    outputs = chat("P2->T2", SamplingParams(temperature=0, max_tokens=160), 40)
    right = sum(o.outputs[0].text == answer for o, answer in zip(outputs, answers(40), strict=True))
    assert right >= 38
    assert all(o.outputs[0].finish_reason == "stop" for o in outputs)


def test_the_plan_does_not_change_sampled_tokens() -> None:
    """But for one row of 24: logits of two plans differ by some 5e-6, which may decide a tie at top-p's border."""
    params = SamplingParams(
        temperature=4.0, top_p=0.9, max_tokens=40, n=2, presence_penalty=0.4, ignore_eos=True
    )
    first, second = chat("T1", params), chat("P2->T2", params)
    assert all([c.index for c in a.outputs] == [0, 1] for a in (*first, *second))
    pairs = [
        pair for a, b in zip(first, second, strict=True) for pair in zip(a.outputs, b.outputs, strict=True)
    ]
    assert len(pairs) == 24 and sum(a.token_ids == b.token_ids for a, b in pairs) >= 23
    assert any(a.outputs[0].token_ids != a.outputs[1].token_ids for a in first)


def test_a_seed_fixes_the_noise_of_its_row() -> None:
    params = SamplingParams(temperature=2.0, max_tokens=30, seed=7, ignore_eos=True)
    with engine("T1") as llm:
        outputs = list(llm.chat(messages(1) * 3, params))
        other = list(
            llm.chat(messages(1), SamplingParams(temperature=2.0, max_tokens=30, seed=8, ignore_eos=True))
        )
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids
    assert other[0].outputs[0].token_ids != outputs[0].outputs[0].token_ids


@pytest.mark.parametrize("plan", ["T2", "P2->T2"])
def test_stop_strings_end_a_sequence(plan: str) -> None:
    for output, answer in zip(
        chat(plan, SamplingParams(temperature=0, max_tokens=160, stop=('","items"',))),
        answers(12),
        strict=True,
    ):
        completion = output.outputs[0]
        assert completion.text == answer.split('","items"')[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", '","items"')


def test_logprobs_are_of_the_chosen_tokens() -> None:
    outputs = chat("P2->T2", SamplingParams(temperature=0, max_tokens=20, logprobs=3), 4)
    for completion in (output.outputs[0] for output in outputs):
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
            assert position[token].rank == 1 and len(position) == 3
            assert all(position[token].logprob >= other.logprob for other in position.values())


def test_an_iterator_is_pulled_lazily() -> None:
    pulled = 0

    def prompts() -> object:
        nonlocal pulled
        while True:
            pulled += 1
            yield {"prompt_token_ids": [1, 5, 6]}

    with engine("T1") as llm:
        outputs = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=3))  # type: ignore[arg-type]
        first = [next(iter(outputs)) for _ in range(1)]
    assert len(first) == 1 and pulled < 1000


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown argument 'max_runing'; did you mean 'max_running'"):
        LLM(EXTRACT / "model", max_runing=2)
    with engine("T1") as llm, pytest.raises(RequestError, match=r"prompt 1: .*vocabulary"):
        llm.generate([[1, 2], [10**6]], SamplingParams(temperature=0, max_tokens=2))


def test_what_cannot_be_a_prompt_is_refused_in_its_place() -> None:
    """It may come from anywhere in an iterator of millions, and must not take the others with it."""
    params = SamplingParams(temperature=0, max_tokens=3)
    chats = messages(2)
    broken = [{"role": "user", "content": None}]
    with engine("T1") as llm:
        given = [broken, chats[0], broken, chats[1], broken]
        found = list(llm.chat(iter(given), params))
        assert [output.error is None for output in found] == [False, True, False, True, False]
        assert [len(output.outputs) for output in found] == [0, 1, 0, 1, 0]
        prompts = list(llm.generate(iter([{"text": "a"}, [1, 5, 6]]), params))
        assert "'prompt' or 'prompt_token_ids'" in str(prompts[0].error) and prompts[1].outputs
        assert [str(o.error) for o in llm.chat(iter([broken]), params)] == [str(found[0].error)]
        with pytest.raises(RequestError, match="prompt 2: "):
            llm.chat([chats[0], chats[1], broken], params)
        assert len(list(llm.chat(chats, params))) == 2  # the engine goes on
