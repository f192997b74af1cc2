"""OpenAI's Batch output contract, checked by hand, and files read the plain way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINE = {"id", "custom_id", "response", "error"}
BODY = {"id", "object", "created", "model", "choices", "usage"}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that must be well-formed to the last byte."""
    if not path.exists():
        return []
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def check_answer(line: dict[str, Any], kind: str) -> None:
    """An output line; `kind` is `chat.completion` or `text_completion`."""
    assert set(line) == LINE
    assert line["id"].startswith("batch_req_")
    assert line["error"] is None
    response = line["response"]
    assert set(response) == {"status_code", "request_id", "body"}
    assert response["status_code"] == 200
    assert isinstance(response["request_id"], str)
    body = response["body"]
    assert set(body) == BODY
    assert body["object"] == kind
    assert type(body["created"]) is int
    usage = body["usage"]
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for index, choice in enumerate(body["choices"]):
        assert choice["index"] == index
        assert choice["finish_reason"] in ("stop", "length")
        content = {"message"} if kind == "chat.completion" else {"text"}
        assert set(choice) == {"index", "finish_reason", "logprobs"} | content
        if kind == "chat.completion":
            assert set(choice["message"]) == {"role", "content", "refusal"}
            assert choice["message"]["role"] == "assistant"
            assert choice["message"]["refusal"] is None
            assert isinstance(choice["message"]["content"], str)
        else:
            assert isinstance(choice["text"], str)


def check_failure(line: dict[str, Any], *, code: str, status: int | None, param: str | None) -> None:
    """An error line: of HTTP shape if `status` is given."""
    assert set(line) == LINE
    assert line["id"].startswith("batch_req_")
    if status is None:
        assert line["response"] is None
        assert set(line["error"]) == {"code", "message"}
        assert line["error"]["code"] == code
        return
    assert line["error"] is None
    assert set(line["response"]) == {"status_code", "request_id", "body"}
    assert line["response"]["status_code"] == status
    assert set(line["response"]["body"]) == {"error"}
    error = line["response"]["body"]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (code, param)


def message(line: dict[str, Any]) -> str:
    """The sentence of an error line."""
    error = line["error"] or line["response"]["body"]["error"]
    text: str = error["message"]
    return text
