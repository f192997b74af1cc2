"""Answers in OpenAI's shapes, and what the fields of a row do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seesaw.core.sampling import SamplingParams
from seesaw.jobs.base import Endpoint, JobOptions, Row
from seesaw.jobs.requests import ModelNames, RequestMaker
from seesaw.jobs.runner import run_job
from tests.jobs.contract import check_answer, read
from tests.jobs.echo_engine import ByteTokenizer, EchoEngine
from tests.jobs.poison import CHAT, MESSAGES, batch


def answer(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The output line of a row that is served."""
    source = path / "in.jsonl"
    source.write_text(json.dumps(row))
    run_job(EchoEngine(), JobOptions(input=source, model="dir/m", output=path / "out.jsonl"))
    (line,) = read(path / "out.jsonl")
    assert not (path / "out.errors.jsonl").exists()
    return line


def sampling(endpoint: Endpoint, /, **body: Any) -> SamplingParams:
    content = {"messages": MESSAGES} if endpoint is Endpoint.CHAT else {"prompt": "abc"}
    maker = RequestMaker(ByteTokenizer(), 100, ModelNames("m", None))
    return maker.make(
        Row(number=1, place="line 1", digest=0, id="a", endpoint=endpoint, body=content | body)
    ).sampling


def test_completion_shape(tmp_path: Path) -> None:
    line = answer(tmp_path, batch("row", model="m", prompt="hello", max_tokens=3, n=2))
    check_answer(line, "text_completion")
    body = line["response"]["body"]
    assert line["custom_id"] == "row"
    assert body["model"] == "dir/m"
    assert [c["text"] for c in body["choices"]] == ["oll", "oll"]
    assert [c["finish_reason"] for c in body["choices"]] == ["length"] * 2
    assert [c["logprobs"] for c in body["choices"]] == [None] * 2
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_chat_shape(tmp_path: Path) -> None:
    line = answer(tmp_path, batch("row", CHAT, model="m", messages=MESSAGES))
    check_answer(line, "chat.completion")
    body = line["response"]["body"]
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"]["content"] == "\niH :resu"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ({"prompt": "abc"}, "text_completion", "cba"),
        ({"prompt": ["abc"]}, "text_completion", "cba"),
        ({"prompt": [97, 98]}, "text_completion", "ba"),
        ({"prompt": [[97, 98]]}, "text_completion", "ba"),
        ({"prompt_token_ids": [97, 98]}, "text_completion", "ba"),
        ({"messages": MESSAGES, "max_tokens": 3}, "chat.completion", "\niH"),
    ],
)
def test_plain_rows_have_the_same_shapes(row: dict[str, Any], kind: str, text: str, tmp_path: Path) -> None:
    line = answer(tmp_path, row)
    check_answer(line, kind)
    assert line["custom_id"] == "line-1"
    choice = line["response"]["body"]["choices"][0]
    assert (choice["text"] if kind == "text_completion" else choice["message"]["content"]) == text


def test_completion_logprobs(tmp_path: Path) -> None:
    line = answer(tmp_path, {"prompt": "abc", "logprobs": 2})
    assert line["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["c", "b", "a"],
        "token_logprobs": [-2.0, -2.0, -2.0],
        "top_logprobs": [{"d": -1.0, "c": -2.0}, {"c": -1.0, "b": -2.0}, {"b": -1.0, "a": -2.0}],
        "text_offset": [0, 1, 2],
    }


def test_completion_logprobs_of_the_chosen_token_alone(tmp_path: Path) -> None:
    logprobs = answer(tmp_path, {"prompt": "a", "logprobs": 0})["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-2.0]
    assert logprobs["top_logprobs"] == [{"a": -2.0}]


@pytest.mark.parametrize("top", [None, 0, 1, 3])
def test_chat_logprobs(top: int | None, tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "u", "content": "é"}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": top,
    }
    logprobs = answer(tmp_path, row)["response"]["body"]["choices"][0]["logprobs"]
    assert set(logprobs) == {"content", "refusal"}
    newline, half, _ = logprobs["content"]
    ranked = [
        {"token": "\x0b", "logprob": -1.0, "bytes": [11]},
        {"token": "\n", "logprob": -2.0, "bytes": [10]},
        {"token": "\x0c", "logprob": -9999.0, "bytes": [12]},
    ]
    assert newline == {"token": "\n", "logprob": -2.0, "bytes": [10], "top_logprobs": ranked[: top or 0]}
    assert (half["token"], half["bytes"]) == ("\ufffd", None)


def test_openai_defaults() -> None:
    assert sampling(Endpoint.COMPLETIONS) == SamplingParams(max_tokens=16, temperature=1.0)
    assert sampling(Endpoint.CHAT).max_tokens == 100
    assert sampling(Endpoint.CHAT, max_completion_tokens=7).max_tokens == 7
    assert sampling(Endpoint.CHAT, max_tokens=7, max_completion_tokens=7).max_tokens == 7


def test_every_sampling_field_arrives() -> None:
    wanted: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "max_tokens": 50,
        "min_tokens": 3,
        "stop": ["x", "y"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "seed": 7,
        "logprobs": 4,
        "skip_special_tokens": False,
    }
    others = {"detokenize", "prompt_logprobs", "prompt_logprobs_start"}  # a job's answers are texts
    assert set(wanted) == set(SamplingParams.__dataclass_fields__) - others
    assert sampling(Endpoint.COMPLETIONS, **wanted) == SamplingParams(**wanted)
    chat = {**wanted, "logprobs": True, "top_logprobs": 4}
    assert sampling(Endpoint.CHAT, **chat) == SamplingParams(**wanted)


def test_nulls_stop_strings_and_whole_floats() -> None:
    nulls = dict.fromkeys(("n", "temperature", "stop", "seed", "logprobs", "stream", "logit_bias", "echo"))
    assert sampling(Endpoint.COMPLETIONS, **nulls) == SamplingParams()
    assert sampling(Endpoint.COMPLETIONS, stop="end").stop == ("end",)
    assert sampling(Endpoint.COMPLETIONS, max_tokens=5.0).max_tokens == 5


def test_fields_without_effect_are_accepted() -> None:
    assert sampling(
        Endpoint.CHAT,
        max_tokens=1,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="flex",
        stream=False,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        parallel_tool_calls=False,
        stream_options=None,
    ) == SamplingParams(max_tokens=1)


def test_template_arguments_reach_the_template() -> None:
    maker = RequestMaker(ByteTokenizer(), 100, ModelNames("m", None))
    body = {"messages": MESSAGES, "chat_template_kwargs": {"thinking": False}, "add_generation_prompt": True}
    request = maker.make(Row(number=1, place="line 1", digest=0, id="a", endpoint=Endpoint.CHAT, body=body))
    assert bytes(request.prompt_token_ids) == b"user: Hi\nadd_generation_prompt=Truethinking=False"
    assert request.prompt is None


@pytest.mark.parametrize(
    ("served", "names", "refused"),
    [
        (None, ["dir/m", "m", "dir/m"], []),
        (None, ["gpt-4o", "m", "gpt-4o", "gpt-5"], ["gpt-5"]),
        ("mine", ["mine", "m", "gpt-4o"], ["gpt-4o"]),
    ],
)
def test_one_model_per_file(served: str | None, names: list[str], refused: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"id": i, "prompt": "a", "model": n}) + "\n" for i, n in enumerate(names))
    )
    run_job(EchoEngine(), JobOptions(input=source, model="dir/m", served_model_name=served))
    failures = read(tmp_path / "in.output.errors.jsonl")
    assert [names[int(f["custom_id"])] for f in failures] == refused
    assert {a["response"]["body"]["model"] for a in read(tmp_path / "in.output.jsonl")} == {served or "dir/m"}
    for failure in failures:
        assert failure["response"]["status_code"] == 404
