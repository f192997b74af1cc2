"""Rows made into requests: prompts to tokens, bodies to sampling parameters."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from seesaw.core.errors import RequestError
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.jobs.base import Encoder, Endpoint, Row
from seesaw.jobs.fields import BodyFields, bad_type, bad_value, read_fields, shown

MODEL_NOT_FOUND = "model_not_found"
_DEFAULT_MAX_TOKENS = 16


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


class RequestMaker:
    """Makes the requests of one job."""

    def __init__(self, encoder: Encoder | None, max_model_len: int, names: ModelNames) -> None:
        self._encoder, self._longest, self._names = encoder, max_model_len, names

    def make(self, row: Row) -> Request:
        """The request of `row`, tokenised. Raises `RequestError`.

        `max_tokens` is 16 where a completion does not set it, and what the context leaves for a chat.
        """
        fields = read_fields(row.endpoint, row.body, plain=row.plain)
        if fields.model is not None:
            self._names.check(fields.model)
        # Sampling is checked first: it costs nothing, tokenising a long prompt does.
        chat = row.endpoint is Endpoint.CHAT
        default = self._longest if chat else _DEFAULT_MAX_TOKENS
        sampling = SamplingParams(**{"max_tokens": default, **fields.sampling})
        text, tokens = self._prompt(fields, row)
        return Request(id=row.id, prompt=text, prompt_token_ids=tuple(tokens), sampling=sampling)

    def skip(self, row: Row) -> None:
        """Pass over a row that was done before: it still settles by which names the model is known."""
        with suppress(RequestError):
            fields = read_fields(row.endpoint, row.body, plain=row.plain)
            if fields.model is not None:
                self._names.check(fields.model)

    def _prompt(self, fields: BodyFields, row: Row) -> tuple[str | None, list[int]]:
        """Text, if the prompt is text, and its tokens."""
        content = fields.content
        if row.endpoint is Endpoint.CHAT:
            return None, self._render(content.get("messages"), fields.template)
        if "prompt_token_ids" in content:
            if "prompt" in content:
                raise bad_value(
                    "prompt_token_ids", content["prompt_token_ids"], "give it or prompt, not both"
                )
            return None, _token_ids("prompt_token_ids", content["prompt_token_ids"])
        prompt = content.get("prompt")
        if prompt is None:
            wanted = "prompt, messages or prompt_token_ids" if row.plain else "prompt"
            raise RequestError(f"{wanted} is missing", code="missing_required_parameter", param="prompt")
        return self._complete(prompt)

    def _complete(self, prompt: object) -> tuple[str | None, list[int]]:
        """OpenAI's `prompt`: text, token ids, or a list with one of these."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise bad_value("prompt", prompt, f"found {len(prompt)} prompts; give each a row of its own")
            prompt = prompt[0]
        if isinstance(prompt, list):
            return None, _token_ids("prompt", prompt)
        if not isinstance(prompt, str):
            raise bad_type("prompt", prompt, "a string or a list of token ids")
        if not prompt:
            raise _empty("prompt")
        return prompt, self._need_encoder("prompt").encode(prompt)

    def _render(self, messages: Any, template: dict[str, Any]) -> list[int]:
        if messages is None:
            raise RequestError("messages is missing", code="missing_required_parameter", param="messages")
        if not isinstance(messages, list):
            raise bad_type("messages", messages, "a list of objects with role and content")
        return self._need_encoder("messages").render_chat(messages, **template)

    def _need_encoder(self, param: str) -> Encoder:
        if self._encoder is None:
            raise RequestError(
                f"{param}: the model has no tokeniser; give prompt_token_ids",
                code="no_tokenizer",
                param=param,
            )
        return self._encoder


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
