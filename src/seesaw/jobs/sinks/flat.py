"""Output and error lines as flat rows of a table."""

from __future__ import annotations

from typing import Any

import msgspec

ANSWER = ("text", "texts", "finish_reason", "prompt_tokens", "completion_tokens")
FAILURE = ("code", "message")
ID = "id"
OURS = frozenset((ID, *ANSWER, *FAILURE))
"""Columns that are not passed through from an input."""
_RENAMED = "input_"


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str | None:
        return self.text if self.message is None else self.message.content


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Response(msgspec.Struct):
    body: _Body | None = None


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: _Error | None = None
    extra: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(_Line)


def flatten(line: bytes) -> dict[str, Any]:
    """The row of a line: `id`, what passed through, then the columns of an answer or of a failure.

    A column that passed through and is called as one of ours gets `input_` before its name. `texts` is there
    only for several completions; `text` is the first of them.
    """
    parsed = _decoder.decode(line)
    row: dict[str, Any] = {ID: parsed.custom_id}
    for name, value in parsed.extra.items():
        row[_free_name(name, parsed.extra)] = value
    body = parsed.response.body if parsed.response is not None else None
    error = parsed.error or (body.error if body is not None else None)
    if error is not None:
        row.update(code=error.code, message=error.message)
    elif body is not None:
        row.update(_answer(body))
    return row


def _answer(body: _Body) -> dict[str, Any]:
    first = body.choices[0] if body.choices else _Choice()
    usage = body.usage or _Usage()
    texts = {"texts": [choice.content for choice in body.choices]} if len(body.choices) > 1 else {}
    return {
        "text": first.content,
        **texts,
        "finish_reason": first.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def _free_name(name: str, others: dict[str, Any]) -> str:
    if name not in OURS:
        return name
    name = _RENAMED + name
    while name in others:
        name = _RENAMED + name
    return name
