"""Rows that cannot be served, each with the code, status and field it must fail with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Poison:
    """A line, in which `@ID@` stands for the id of its row, and what must become of it."""

    name: str
    line: bytes
    code: str
    param: str | None = None
    status: int | None = 400
    has_id: bool = True


def batch(custom_id: str, url: str = COMPLETIONS, method: str = "POST", **body: Any) -> dict[str, Any]:
    """A Batch line."""
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def _request(name: str, code: str, param: str | None, url: str = COMPLETIONS, **body: Any) -> Poison:
    content = {"prompt": "abc"} if url == COMPLETIONS else {"messages": MESSAGES}
    fields = {k: v for k, v in {**content, **body}.items() if v != "LEAVE OUT"}
    line = json.dumps(batch("@ID@", url, **fields)).encode()
    return Poison(name, line, code, param, 404 if code == "model_not_found" else 400)


def _line(name: str, line: bytes | dict[str, Any], code: str, *, has_id: bool = True) -> Poison:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    return Poison(name, data, code, status=None, has_id=has_id)


POISONS = [
    # lines that are no request
    _line("truncated JSON", b'{"custom_id": "@ID@", "prompt": "abc', "invalid_json", has_id=False),
    _line("not JSON", b"hello", "invalid_json", has_id=False),
    _line("two objects", b'{"prompt": "a"} {"prompt": "b"}', "invalid_json", has_id=False),
    _line("NaN", b'{"id": "@ID@", "prompt": "a", "temperature": NaN}', "invalid_json", has_id=False),
    _line("huge number", b'{"prompt": "a", "temperature": 1e999}', "invalid_json", has_id=False),
    _line("lone surrogate", b'{"prompt": "\\ud800"}', "invalid_json", has_id=False),
    _line("deep", b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "invalid_json", has_id=False),
    _line("list", b'["prompt"]', "invalid_json", has_id=False),
    _line("null", b"null", "invalid_json", has_id=False),
    _line("bad UTF-8", b'{"id": "@ID@", "prompt": "\xff\xfe"}', "invalid_utf8", has_id=False),
    _line("bad UTF-8 outside of strings", b"\xc3\x28", "invalid_utf8", has_id=False),
    _line("no custom_id", {"method": "POST", "url": CHAT, "body": {}}, "missing_custom_id", has_id=False),
    _line("custom_id a number", {**batch("x"), "custom_id": 5}, "invalid_custom_id", has_id=False),
    _line("custom_id empty", batch("", prompt="a"), "invalid_custom_id", has_id=False),
    _line("custom_id null", {**batch("x"), "custom_id": None}, "invalid_custom_id", has_id=False),
    _line("two ids", {"id": "a", "custom_id": "b", "prompt": "a"}, "invalid_custom_id", has_id=False),
    _line("GET", batch("@ID@", method="GET", prompt="a"), "invalid_method"),
    _line("no method", {"custom_id": "@ID@", "url": CHAT, "body": {}}, "invalid_method"),
    _line("embeddings", batch("@ID@", "/v1/embeddings", input="a"), "invalid_url"),
    _line("url a list", {**batch("@ID@"), "url": [CHAT]}, "invalid_url"),
    _line("no url", {"custom_id": "@ID@", "method": "POST", "body": {}}, "invalid_url"),
    _line("no body", {"custom_id": "@ID@", "method": "POST", "url": CHAT}, "invalid_body"),
    _line("body a string", {**batch("@ID@"), "body": "{}"}, "invalid_body"),
    _line("parameter beside the body", {**batch("@ID@", prompt="a"), "max_tokens": 5}, "unknown_parameter"),
    # requests that cannot be served
    _request("unknown model", "model_not_found", "model", model="gpt-17"),
    _request("model a number", "invalid_type", "model", model=5),
    _request("empty prompt", "empty_prompt", "prompt", prompt=""),
    _request("empty token list", "empty_prompt", "prompt", prompt=[]),
    _request("no prompt", "missing_required_parameter", "prompt", prompt="LEAVE OUT"),
    _request("prompt null", "missing_required_parameter", "prompt", prompt=None),
    _request("prompt a number", "invalid_type", "prompt", prompt=5),
    _request("prompt of mixed types", "invalid_type", "prompt", prompt=[1, "a"]),
    _request("prompt of booleans", "invalid_type", "prompt", prompt=[True]),
    _request("negative token", "invalid_value", "prompt", prompt=[-1]),
    _request("two prompts", "invalid_value", "prompt", prompt=["a", "b"]),
    _request("over-long", "context_length_exceeded", "prompt", prompt="x" * 500),
    _request("max_tokens 0", "invalid_value", "max_tokens", max_tokens=0),
    _request("max_tokens text", "invalid_type", "max_tokens", max_tokens="5"),
    _request("max_tokens 1.5", "invalid_type", "max_tokens", max_tokens=1.5),
    _request("max_tokens true", "invalid_type", "max_tokens", max_tokens=True),
    _request("max_tokens huge", "invalid_value", "max_tokens", max_tokens=10**30),
    _request("min above max", "invalid_value", "min_tokens", max_tokens=3, min_tokens=4),
    _request("temperature -1", "invalid_value", "temperature", temperature=-1),
    _request("temperature huge", "invalid_value", "temperature", temperature=10**400 // 1),
    _request("temperature text", "invalid_type", "temperature", temperature="hot"),
    _request("top_p 0", "invalid_value", "top_p", top_p=0),
    _request("top_k -2", "invalid_value", "top_k", top_k=-2),
    _request("top_k beyond 64 bits", "invalid_value", "top_k", top_k=2**70),
    _request("n 0", "invalid_value", "n", n=0),
    _request("n a billion", "invalid_value", "n", n=10**9),
    _request("logprobs 21", "invalid_value", "logprobs", logprobs=21),
    _request("logprobs true", "invalid_type", "logprobs", logprobs=True),
    _request("penalty 3", "invalid_value", "presence_penalty", presence_penalty=3),
    _request("seed text", "invalid_type", "seed", seed="x"),
    _request("stop a number", "invalid_type", "stop", stop=5),
    _request("stop empty", "invalid_value", "stop", stop=[""]),
    _request("stop ids text", "invalid_type", "stop_token_ids", stop_token_ids=["a"]),
    _request("stop id huge", "invalid_value", "stop_token_ids", stop_token_ids=[2**40]),
    _request("ignore_eos 1", "invalid_type", "ignore_eos", ignore_eos=1),
    _request("stream", "unsupported_parameter", "stream", stream=True),
    _request("stream 1", "unsupported_parameter", "stream", stream=1),
    _request("echo", "unsupported_parameter", "echo", echo=True),
    _request("logit_bias", "unsupported_parameter", "logit_bias", logit_bias={"5": 1}),
    _request("misspelt", "unknown_parameter", "temprature", temprature=0),
    _request("messages in a completion", "unknown_parameter", "messages", messages=MESSAGES),
    _request("prompt in a chat", "unknown_parameter", "prompt", CHAT, prompt="a"),
    _request("no messages", "missing_required_parameter", "messages", CHAT, messages="LEAVE OUT"),
    _request("messages text", "invalid_type", "messages", CHAT, messages="Hi"),
    _request("messages empty", "invalid_messages", "messages", CHAT, messages=[]),
    _request("tools", "unsupported_parameter", "tools", CHAT, tools=[{"type": "function"}]),
    _request(
        "JSON mode", "unsupported_parameter", "response_format", CHAT, response_format={"type": "json_object"}
    ),
    _request("top_logprobs alone", "invalid_value", "top_logprobs", CHAT, top_logprobs=2),
    _request("top_logprobs 21", "invalid_value", "top_logprobs", CHAT, logprobs=True, top_logprobs=21),
    _request("chat logprobs 2", "invalid_type", "logprobs", CHAT, logprobs=2),
    _request(
        "max_completion_tokens 0", "invalid_value", "max_completion_tokens", CHAT, max_completion_tokens=0
    ),
    _request(
        "two limits", "invalid_value", "max_completion_tokens", CHAT, max_tokens=5, max_completion_tokens=6
    ),
    _request("template", "unsupported_parameter", "chat_template", CHAT, chat_template="{{ 1 }}"),
    _request(
        "template arguments",
        "invalid_value",
        "chat_template_kwargs",
        CHAT,
        chat_template_kwargs={"tokenize": False},
    ),
    Poison("plain without prompt", b'{"id": "@ID@"}', "missing_required_parameter", "prompt"),
    Poison("plain, own column", b'{"id": "@ID@", "prompt": "a", "label": 1}', "unknown_parameter", "label"),
    Poison(
        "plain, both prompts",
        b'{"id": "@ID@", "prompt": "a", "prompt_token_ids": [1]}',
        "invalid_value",
        "prompt_token_ids",
    ),
]
