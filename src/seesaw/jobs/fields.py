"""Fields of a request body: which exist, what each must be, and what becomes of it.

Every field of a body is used, known to have no effect on the answer, or refused by name; nothing that a user
asks for is dropped in silence. A null stands for the default, as in OpenAI's API.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from seesaw.core.errors import RequestError
from seesaw.jobs.base import Endpoint

MAX_N = 128
"""Most completions of one row, as in OpenAI's API."""
_INT_LIMIT = 1 << 62
_SHOWN = 60

_NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority"}
    | {"prompt_cache_key", "prompt_cache_retention", "cache_salt", "prediction", "stream_options"}
    | {"parallel_tool_calls"}
    | {"session_id", "stream_interval", "include_reasoning", "truncation_side", "routed_experts_prompt_start"}
    | {"media_io_kwargs", "mm_payload", "return_mm_kwargs", "return_token_offsets"}
)
"""About billing, tracing and caching; about the pace of an answer, not its content; or about what is refused by
another name (of vLLM's fields)."""

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "logprob_token_ids": ([],),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "watermarking": (False,),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
}
"""Fields that would change the answer, with the values at which they do not."""

_UNSUPPORTED_IN_CHATS: dict[str, tuple[object, ...]] = {"add_special_tokens": (False,)}
"""Where other values change nothing: a chat's special tokens are those of its template."""

_TEMPLATE_RESERVED = frozenset(
    {"conversation", "tools", "documents", "chat_template", "tokenize", "padding", "truncation", "max_length"}
    | {
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
    }
)
"""Arguments of `apply_chat_template` that are not for a row to set."""


@dataclass(slots=True)
class BodyFields:
    """What a body asks for beside its prompt, checked as far as it can be without the model."""

    sampling: dict[str, Any] = field(default_factory=dict)
    """Arguments of `SamplingParams`; fields that the body does not set are left out."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    model: str | None = None


def settings_of(endpoint: Endpoint, body: dict[str, Any], *, plain: bool = False) -> dict[str, Any]:
    """The fields of a body but for its prompt and those that have no effect: what `read_fields` reads."""
    apart = _APART[endpoint, plain]
    return {name: value for name, value in body.items() if name not in apart}


def read_fields(endpoint: Endpoint, settings: dict[str, Any], *, plain: bool = False) -> BodyFields:
    """Sort what `settings_of` a body gives. Raises `RequestError` naming the field that cannot be served."""
    fields = BodyFields()
    readers = _READERS[endpoint]
    for name, value in settings.items():
        if name in readers:
            if value is not None:
                readers[name](fields, name, value)
        elif name in _UNSUPPORTED:
            _check_unsupported(endpoint, name, value)
        else:
            raise _unknown(endpoint, name, plain)
    if endpoint is Endpoint.CHAT:
        _join_chat_logprobs(fields)
    return fields


def parameter_names() -> frozenset[str]:
    """Names that a column of a table may have to be a parameter of its rows.

    The model is not among them, nor a name that a table is more likely to use for data of its own.
    """
    known = {*_READERS[Endpoint.CHAT], *_READERS[Endpoint.COMPLETIONS], *_UNSUPPORTED}
    return frozenset(known - {"model", "documents", "audio", "suffix", "functions"})


def shown(value: object) -> str:
    """`value` as it goes into a message: never long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def bad_type(name: str, value: object, wanted: str) -> RequestError:
    """The error for a field of another type than `wanted`."""
    return RequestError(f"{name}={shown(value)}: expected {wanted}", code="invalid_type", param=name)


def bad_value(name: str, value: object, wanted: str) -> RequestError:
    """The error for a value outside of what is `wanted`."""
    return RequestError(f"{name}={shown(value)}: {wanted}", code="invalid_value", param=name)


def _check_unsupported(endpoint: Endpoint, name: str, value: object) -> None:
    neutral = _UNSUPPORTED[name]
    if endpoint is Endpoint.CHAT:
        neutral = _UNSUPPORTED_IN_CHATS.get(name, neutral)
    # True == 1 in Python, but not in JSON.
    if value is None or any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
        return
    if name == "stream":
        message = "stream=true: a job's answers are written when they are whole; leave stream out"
    else:
        instead = f"leave it out or give {shown(neutral[0])}" if neutral else "leave it out"
        message = f"{name}={shown(value)} is not supported; {instead}"
    raise RequestError(message, code="unsupported_parameter", param=name)


def _unknown(endpoint: Endpoint, name: str, plain: bool) -> RequestError:
    known = [*_CONTENT[endpoint], *_READERS[endpoint], *_UNSUPPORTED, *_NO_EFFECT]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if plain and not hint:
        hint = "; data of your own can stand under 'metadata'"
    where = "a plain row" if plain else endpoint.value
    return RequestError(
        f"unknown parameter {shown(name)} for {where}{hint}", code="unknown_parameter", param=name[:_SHOWN]
    )


def _int(name: str, value: object) -> int:
    """Whole numbers, also as 3.0 (data frames write them so), within what travels in 64 bits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(name, value, "a whole number")
    if abs(value) >= _INT_LIMIT:
        raise bad_value(name, value, "the number is too large")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, value, "a number")
    return value if abs(value) < _INT_LIMIT else float("inf")  # the range check says what would work


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise bad_type(name, value, "true or false")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise bad_type(name, value, "a string or a list of strings")
    return tuple(values)


def _ints(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise bad_type(name, value, "a list of token ids")
    ids = tuple(_int(name, v) for v in value)
    if any(not 0 <= v < 1 << 31 for v in ids):
        raise bad_value(name, value, "token ids are not negative and below 2^31")
    return ids


def _count(name: str, value: object) -> int:
    count = _int(name, value)
    if not 1 <= count <= MAX_N:
        raise bad_value(name, value, f"must be from 1 to {MAX_N}")
    return count


_Take = Callable[[BodyFields, str, Any], None]


def _sampled(read: Callable[[str, object], Any]) -> _Take:
    def take(fields: BodyFields, name: str, value: object) -> None:
        fields.sampling[name] = read(name, value)

    return take


def _take_model(fields: BodyFields, name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise bad_type(name, value, "the name of a model")
    fields.model = value


def _take_max_tokens(fields: BodyFields, name: str, value: object) -> None:
    """`max_tokens` and its newer name `max_completion_tokens`."""
    count = _int(name, value)
    if count < 1:
        raise bad_value(name, value, "must be a whole number of at least 1")
    if fields.sampling.setdefault("max_tokens", count) != count:
        raise bad_value(name, value, "max_tokens and max_completion_tokens differ; give one of them")


def _take_template_flag(fields: BodyFields, name: str, value: object) -> None:
    fields.template[name] = _bool(name, value)


def _take_template_kwargs(fields: BodyFields, name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise bad_type(name, value, "an object with variables of the chat template")
    reserved = next((key for key in value if key in _TEMPLATE_RESERVED), None)
    if reserved is not None:
        raise bad_value(name, value, f"{reserved} is not a variable of the chat template")
    fields.template.update(value)


def _join_chat_logprobs(fields: BodyFields) -> None:
    """Chat says `logprobs: true` and, beside it, how many alternatives."""
    wanted = fields.sampling.pop("logprobs", False)
    top = fields.sampling.pop("top_logprobs", None)
    if top and not wanted:
        raise bad_value("top_logprobs", top, "needs logprobs=true")
    if top is not None and not 0 <= top <= 20:
        raise bad_value("top_logprobs", top, "must be from 0 to 20")
    if wanted:
        fields.sampling["logprobs"] = top or 0


_SHARED: dict[str, _Take] = {
    "model": _take_model,
    "max_tokens": _take_max_tokens,
    "n": _sampled(_count),
    "stop": _sampled(_strings),
    "stop_token_ids": _sampled(_ints),
    **dict.fromkeys(("top_k", "min_tokens", "seed"), _sampled(_int)),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        _sampled(_number),
    ),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), _sampled(_bool)),
}
_READERS: dict[Endpoint, dict[str, _Take]] = {
    Endpoint.CHAT: {
        **_SHARED,
        "max_completion_tokens": _take_max_tokens,
        "logprobs": _sampled(_bool),
        "top_logprobs": _sampled(_int),
        "chat_template_kwargs": _take_template_kwargs,
        "add_generation_prompt": _take_template_flag,
        "continue_final_message": _take_template_flag,
    },
    Endpoint.COMPLETIONS: {**_SHARED, "logprobs": _sampled(_int)},
}
_CONTENT = {Endpoint.CHAT: ("messages",), Endpoint.COMPLETIONS: ("prompt",)}
"""Where the prompt stands."""
_APART = {
    (endpoint, plain): _NO_EFFECT.union(names, ("prompt_token_ids",) if plain and "prompt" in names else ())
    for endpoint, names in _CONTENT.items()
    for plain in (False, True)
}
"""By endpoint and whether a row is plain: fields that are no settings."""
