"""Rows made into requests: prompts to tokens, bodies to sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from seesaw.core.errors import RequestError
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.jobs.base import Encoder, Endpoint, Row
from seesaw.jobs.fields import bad_type, bad_value, read_fields, settings_of, shown

MODEL_NOT_FOUND = "model_not_found"
INTERNAL_ERROR = "internal_error"
_DEFAULT_MAX_TOKENS = 16
_MOST_SETTINGS = 256


class ModelNames:
    """Names by which rows may ask for the model of a job.

    A job serves one model. Its rows may call it by a name it is known by, or, unless the names were fixed
    with `served_model_name`, by one other name, the same throughout the file: files written for another
    service run as they are, and a stray row for another model is noticed.
    """

    def __init__(self, model: str, served_model_name: str | None) -> None:
        self._known = {model, model.rstrip("/").rpartition("/")[2]}
        self._open = served_model_name is None
        if served_model_name is not None:
            self._known.add(served_model_name)

    def check(self, name: str) -> None:
        """Raise `RequestError` if `name` is not this job's model."""
        if name in self._known:
            return
        if not self._open:
            raise RequestError(
                f"model={shown(name)}: this job runs {', '.join(sorted(map(repr, self._known)))}",
                code=MODEL_NOT_FOUND,
                param="model",
            )
        # The first foreign name is taken for an alias, and is the last.
        self._known.add(name)
        self._open = False


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A row whose fields are checked. Its prompt is known as tokens, or is still to be encoded."""

    id: str
    sampling: SamplingParams
    text: str | None = None
    """The prompt, where it is text."""
    messages: list[Any] | None = None
    """The conversation, where the row is a chat."""
    template: dict[str, Any] = {}
    """Arguments of the chat template."""
    tokens: tuple[int, ...] | None = None
    """The prompt, where the row gives token ids."""

    @property
    def item(self) -> str | tuple[list[Any], dict[str, Any]]:
        """What is to be encoded, for `encode_item`."""
        if self.messages is not None:
            return self.messages, self.template
        assert self.text is not None, "the prompt is known as tokens"
        return self.text

    def request(self, tokens: tuple[int, ...]) -> Request:
        """The request, its prompt being `tokens`."""
        return Request(id=self.id, prompt=self.text, prompt_token_ids=tokens, sampling=self.sampling)


def encode_item(encoder: Encoder, item: Any) -> list[int]:
    """The tokens of text or of `(messages, template)`. Whatever goes wrong is a `RequestError`, of one row."""
    try:
        return encoder.encode(item) if isinstance(item, str) else encoder.render_chat(item[0], **item[1])
    except (RequestError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a tokeniser in Rust panics with a type that is no Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"the tokeniser failed on this row ({reason})", code=INTERNAL_ERROR) from error


class _Settings(msgspec.Struct, frozen=True, gc=False):
    """What a body asks for beside its prompt."""

    sampling: SamplingParams
    template: dict[str, Any]
    model: str | None


class RequestMaker:
    """Makes the requests of one job."""

    def __init__(
        self,
        encoder: Encoder | None,
        max_model_len: int,
        names: ModelNames,
        defaults: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """`defaults` are arguments of `SamplingParams` where a row leaves them open; `max_tokens` goes before."""
        self._encoder, self._longest, self._names = encoder, max_model_len, names
        self._defaults, self._max_tokens = dict(defaults or {}), max_tokens
        self._settings: dict[object, _Settings] = {}
        """By what they are made of: most rows of a job have the same."""

    def make(self, row: Row) -> Request:
        """The request of `row`, tokenised. Raises `RequestError`."""
        draft = self.draft(row)
        return draft.request(self.encode(draft))

    def draft(self, row: Row) -> Draft:
        """All of `make` but the tokenising: cheap, and to be called in the order of the rows. Raises `RequestError`.

        `max_tokens` is the job's where a row does not set it. Without one it is 16 of a completion, and of a chat
        what the model recommends, or what the context leaves.
        """
        # Sampling is checked before the prompt, whoever encodes that: a row has the same error either way.
        settings = self._known_settings(row)
        if row.endpoint is Endpoint.CHAT:
            return Draft(row.id, settings.sampling, messages=_messages(row.body), template=settings.template)
        prompt = _prompt(row)
        if isinstance(prompt, str):
            return Draft(row.id, settings.sampling, prompt)
        return Draft(row.id, settings.sampling, tokens=tuple(prompt))

    def skip(self, row: Row) -> None:
        """Pass over a row that was done before: it still settles by which names the model is known."""
        with suppress(RequestError):
            self._known_settings(row)

    def encode(self, draft: Draft) -> tuple[int, ...]:
        """The tokens of a prompt. Raises `RequestError`."""
        if draft.tokens is not None:
            return draft.tokens
        encoder = self._need_encoder("prompt" if draft.messages is None else "messages")
        return tuple(encode_item(encoder, draft.item))

    def _known_settings(self, row: Row) -> _Settings:
        """All of a body but its prompt, read once for all rows that say the same."""
        given = settings_of(row.endpoint, row.body, plain=row.plain)
        # 1, 1.0 and true are equal in Python, and not the same in a body.
        key = (row.endpoint, row.plain, *given.items(), *map(type, given.values()))
        try:
            settings = self._settings.get(key)
        except TypeError:  # lists and objects are no part of a key
            return self._read_settings(row, given)
        if settings is None:
            settings = self._read_settings(row, given)
            if len(self._settings) >= _MOST_SETTINGS:
                self._settings.clear()
            self._settings[key] = settings
        elif settings.model is not None:
            self._names.check(settings.model)
        return settings

    def _read_settings(self, row: Row, given: dict[str, Any]) -> _Settings:
        fields = read_fields(row.endpoint, given, plain=row.plain)
        if fields.model is not None:
            self._names.check(fields.model)
        longest = self._max_tokens
        if longest is None:
            chat = row.endpoint is Endpoint.CHAT
            longest = self._defaults.get("max_tokens", self._longest) if chat else _DEFAULT_MAX_TOKENS
        sampling = SamplingParams(**(self._defaults | {"max_tokens": longest} | fields.sampling))
        return _Settings(sampling, fields.template, fields.model)

    def _need_encoder(self, param: str) -> Encoder:
        if self._encoder is None:
            raise RequestError(
                f"{param}: the model has no tokeniser; give prompt_token_ids",
                code="no_tokenizer",
                param=param,
            )
        return self._encoder


def _prompt(row: Row) -> str | list[int]:
    """The prompt of a completion: text or token ids."""
    prompt = row.body.get("prompt")
    if "prompt_token_ids" in row.body:
        ids = row.body["prompt_token_ids"]
        if prompt is not None:
            raise bad_value("prompt_token_ids", ids, "give it or prompt, not both")
        return _token_ids("prompt_token_ids", ids)
    if prompt is None:
        wanted = "prompt, messages or prompt_token_ids" if row.plain else "prompt"
        raise RequestError(f"{wanted} is missing", code="missing_required_parameter", param="prompt")
    return _completed(prompt)


def _completed(prompt: object) -> str | list[int]:
    """OpenAI's `prompt`: text, token ids, or a list with one of these."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise bad_value("prompt", prompt, f"found {len(prompt)} prompts; give each a row of its own")
        prompt = prompt[0]
    if isinstance(prompt, list):
        return _token_ids("prompt", prompt)
    if not isinstance(prompt, str):
        raise bad_type("prompt", prompt, "a string or a list of token ids")
    if not prompt:
        raise _empty("prompt")
    return prompt


def _messages(content: dict[str, Any]) -> list[Any]:
    messages = content.get("messages")
    if messages is None:
        raise RequestError("messages is missing", code="missing_required_parameter", param="messages")
    if not isinstance(messages, list):
        raise bad_type("messages", messages, "a list of objects with role and content")
    return messages


def _token_ids(name: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise bad_type(name, value, "a list of token ids")
    if not value:
        raise _empty(name)
    if not 0 <= min(value) <= max(value) < 1 << 31:
        raise bad_value(name, value, "token ids are not negative and below 2^31")
    return value


def _empty(name: str) -> RequestError:
    return RequestError("the prompt is empty", code="empty_prompt", param=name)
