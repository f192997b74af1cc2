"""OpenAI's response objects and the lines of Batch output files, as msgspec structs.

Field names and nesting are OpenAI's (`chat.completion`, `text_completion`, Batch output line); a field that is
always null there for such answers is written as null, not left out.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from seesaw.core.request import CompletionOutput, RequestOutput, TokenLogprob
from seesaw.jobs.base import Endpoint

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a response; completion tokens are summed over choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry per token. Offsets are characters into the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of the token; None where the token is no whole character."""


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    """Unix seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class TextCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    """Unix seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class ApiError(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    error: ApiError


class BatchResponse(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: ChatCompletion | TextCompletion | ErrorBody


class BatchError(msgspec.Struct, frozen=True):
    """Why a line never became a request."""

    code: str
    message: str


class BatchLine(msgspec.Struct, frozen=True):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: BatchResponse | None
    error: BatchError | None


def response_body(
    endpoint: Endpoint, output: RequestOutput, *, serial: str, created: int, model: str
) -> ChatCompletion | TextCompletion:
    """The response object of an answered request. `serial` makes its id unique; `created` is in Unix seconds."""
    prompt = len(output.prompt_token_ids)
    completion = sum(len(choice.token_ids) for choice in output.outputs)
    shared: dict[str, Any] = {
        "created": created,
        "model": model,
        "usage": Usage(prompt, completion, prompt + completion),
    }
    if endpoint is Endpoint.CHAT:
        return ChatCompletion(id=f"chatcmpl-{serial}", choices=[_chat(c) for c in output.outputs], **shared)
    return TextCompletion(id=f"cmpl-{serial}", choices=[_completion(c) for c in output.outputs], **shared)


def _chat(output: CompletionOutput) -> ChatChoice:
    logprobs = None
    if output.logprobs is not None:
        logprobs = ChatLogprobs([_chat_token(entries) for entries in output.logprobs])
    return ChatChoice(output.index, ChatMessage(output.text), logprobs, output.finish_reason)


def _chat_token(entries: dict[int, TokenLogprob]) -> ChatTokenLogprob:
    """The chosen token stands first in `entries`; it is among the alternatives only where its rank puts it."""
    (token, chosen), *others = entries.items()
    top = [TopLogprob(*_token(i, entry)) for i, entry in _ranked(entries, len(others))]
    return ChatTokenLogprob(*_token(token, chosen), top)


def _ranked(entries: dict[int, TokenLogprob], others: int) -> list[tuple[int, TokenLogprob]]:
    return []


def _token(token: int, entry: TokenLogprob) -> tuple[str, float, list[int] | None]:
    text = _text(token, entry)
    whole = entry.text is not None and "\ufffd" not in text
    return text, _finite(entry.logprob), list(text.encode()) if whole else None
