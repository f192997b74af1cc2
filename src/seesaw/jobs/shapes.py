"""OpenAI's response objects and the lines of Batch output files, as msgspec structs.

Field names and nesting are OpenAI's (`chat.completion`, `text_completion`, Batch output line); a field that
is always null there for such answers is written as null, not left out.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from seesaw.core.request import CompletionOutput, RequestOutput, TokenLogprob
from seesaw.jobs.base import Endpoint

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts of a response; completion tokens are summed over choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Parallel lists, one entry per token. Offsets are characters into the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, gc=False):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of the token; None where the token is no whole character."""


class ChatTokenLogprob(msgspec.Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, gc=False):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, gc=False):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ApiError(msgspec.Struct, frozen=True, gc=False):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True, gc=False):
    error: ApiError


class BatchResponse(msgspec.Struct, frozen=True, gc=False):
    status_code: int
    request_id: str
    body: ChatCompletion | TextCompletion | ErrorBody


class BatchError(msgspec.Struct, frozen=True, gc=False):
    """Why a line never became a request."""

    code: str
    message: str


class BatchLine(msgspec.Struct, frozen=True, gc=False):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: BatchResponse | None
    error: BatchError | None
    extra: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """What passed through from the row's input; left out where nothing did, as OpenAI's lines are."""


def response_body(
    endpoint: Endpoint, output: RequestOutput, *, top: int, serial: str, created: int, model: str
) -> ChatCompletion | TextCompletion:
    """The response object of an answered request.

    `top` is the number of alternatives asked for at each token (where log-probabilities were asked for),
    `serial` makes the object's id unique, `created` is in Unix seconds.
    """
    prompt = len(output.prompt_token_ids)
    completion = sum(len(choice.token_ids) for choice in output.outputs)
    usage = Usage(prompt, completion, prompt + completion)
    if endpoint is Endpoint.CHAT:
        return ChatCompletion(
            id=f"chatcmpl-{serial}",
            created=created,
            model=model,
            choices=[_chat(choice, top) for choice in output.outputs],
            usage=usage,
        )
    return TextCompletion(
        id=f"cmpl-{serial}",
        created=created,
        model=model,
        choices=[_completion(choice) for choice in output.outputs],
        usage=usage,
    )


def _chat(output: CompletionOutput, top: int) -> ChatChoice:
    logprobs = None
    if output.logprobs is not None:
        logprobs = ChatLogprobs([_chat_token(entries, top) for entries in output.logprobs])
    return ChatChoice(output.index, ChatMessage(content=output.text), logprobs, output.finish_reason)


def _chat_token(entries: dict[int, TokenLogprob], top: int) -> ChatTokenLogprob:
    token, chosen = next(iter(entries.items()))
    best = [TopLogprob(*_token(i, entry)) for i, entry in _by_rank(entries)[:top]]
    return ChatTokenLogprob(*_token(token, chosen), best)


def _completion(output: CompletionOutput) -> CompletionChoice:
    logprobs = None if output.logprobs is None else _completion_logprobs(output.logprobs)
    return CompletionChoice(output.index, output.text, logprobs, output.finish_reason)


def _completion_logprobs(positions: list[dict[int, TokenLogprob]]) -> CompletionLogprobs:
    """The chosen token is always among the `top_logprobs`, so they may be one more than asked for."""
    result = CompletionLogprobs([], [], [], [])
    offset = 0
    for entries in positions:
        token, chosen = next(iter(entries.items()))
        text = _text(token, chosen)
        top: dict[str, float] = {}
        for other, entry in _by_rank(entries):  # of tokens with the same text the most likely stays
            top.setdefault(_text(other, entry), _finite(entry.logprob))
        result.tokens.append(text)
        result.token_logprobs.append(_finite(chosen.logprob))
        result.top_logprobs.append(top)
        result.text_offset.append(offset)
        offset += len(text)
    return result


def _by_rank(entries: dict[int, TokenLogprob]) -> list[tuple[int, TokenLogprob]]:
    return sorted(entries.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0))


def _token(token: int, entry: TokenLogprob) -> tuple[str, float, list[int] | None]:
    text = _text(token, entry)
    whole = entry.text is not None and "\ufffd" not in text
    return text, _finite(entry.logprob), list(text.encode()) if whole else None


def _text(token: int, entry: TokenLogprob) -> str:
    return f"token_id:{token}" if entry.text is None else entry.text


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
