"""A batch file for `vllm run-batch`: bodies with all that vLLM knows beside OpenAI's fields, and rows that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ORDERS = (
    "We need 235 door hinges in Vilnius on 12.7.2027. Contact: Erik Wagner.",
    "Please send 12 ladders to Porto by 3 May 2026.",
)
_OPENAI: dict[str, Any] = {
    **{"logprobs": False, "top_logprobs": 0, "n": 1, "stream": False, "tools": None, "tool_choice": "none"},
    **{"user": "me", "logit_bias": None, "response_format": {"type": "text"}, "frequency_penalty": 0.0},
    **{"presence_penalty": 0.0, "stop": None, "parallel_tool_calls": True},
}
"""Fields that clients write out although they ask for nothing."""
_VLLM: dict[str, Any] = {
    **{"add_special_tokens": False, "echo": False, "include_reasoning": True, "return_token_ids": False},
    **{"return_tokens_as_token_ids": False, "priority": 0, "request_id": "mine", "use_beam_search": False},
    **{
        "length_penalty": 1.0,
        "stop_token_ids": [],
        "bad_words": [],
        "prompt_logprobs": None,
        "vllm_xargs": {},
    },
    **{"truncate_prompt_tokens": None, "mm_processor_kwargs": None, "cache_salt": "abc", "documents": []},
}
_EXTRAS: dict[str, Any] = {
    **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.1, "ignore_eos": False, "min_tokens": 5, "seed": 1},
    **{"include_stop_str_in_output": True, "stop": ['","'], "skip_special_tokens": True},
    **{"spaces_between_special_tokens": True},
}

ANSWERED: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 160},
    "no limit": {},
    "recommended": {"temperature": None},
    "completion tokens": {"max_completion_tokens": 12},
    "extras": {"max_tokens": 160, **_EXTRAS},
    "past the end": {"max_tokens": 140, "ignore_eos": True},
    "template": {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ORDERS[1]}]}]},
    "continued": {
        "messages": [
            {"role": "user", "content": ORDERS[0]},
            {"role": "assistant", "content": '{"name":"Erik'},
        ],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "logprobs": {"max_tokens": 8, "logprobs": True, "top_logprobs": 2},
    "client's defaults": {"max_tokens": 8, **_OPENAI},
    "vLLM's defaults": {"max_tokens": 8, **_VLLM},
    "several": {"max_tokens": 8, "temperature": 0.5, "top_k": 1, "n": 2},
    "stop token": {"max_tokens": 160, "stop_token_ids": list(range(300, 400))},
    "no model": {"model": None, "max_tokens": 8},
}
"""Bodies that both answer, by id, over those of every row."""

FAILED: dict[str, tuple[dict[str, Any], str]] = {
    "other model": ({"model": "other"}, "this job runs"),
    "too long": ({"messages": [{"role": "user", "content": "x " * 600}]}, "at most 511 fit"),
    "cold": ({"temperature": -1}, "temperature=-1"),
    "stream": ({"stream": True}, "leave stream out"),
    "no messages": ({"messages": []}, "at least one message"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        "only text parts are supported",
    ),
}
"""Bodies that neither answers, with what our error says."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"logit_bias": {"300": 5}}, "logit_bias={'300': 5} is not supported"),
    "choice": ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
    "old choice": ({"guided_choice": ["a", "b"]}, "guided_choice=['a', 'b'] is not supported"),
    "schema": ({"response_format": {"type": "json_object"}}, "response_format"),
    "prompt logprobs": ({"prompt_logprobs": 1}, "prompt_logprobs=1 is not supported"),
    "token ids": ({"return_token_ids": True}, "return_token_ids=True is not supported"),
    "made up": ({"made_up": 1}, "unknown parameter 'made_up'"),
}
"""Bodies that vLLM answers, minding or passing over the field, and we refuse by its name."""

ELSEWHERE: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "hello"},
    "/v1/score": {"queries": "hello", "documents": ["a"]},
    "/rerank": {"query": "hello", "documents": ["a"]},
}
"""Endpoints for other models than those that generate, and bodies that are right for them."""


def write_batch(path: Path) -> None:
    """The file, with every row above."""
    bodies = ANSWERED | {name: body for name, (body, _) in (FAILED | REFUSED).items()}
    rows = [_row(name, _body(name, body)) for name, body in bodies.items()]
    rows += [_row(url, {"model": "extract", **body}, url) for url, body in ELSEWHERE.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _body(name: str, given: dict[str, Any]) -> dict[str, Any]:
    order = ORDERS[len(name) % len(ORDERS)]
    body = {"model": "extract", "messages": [{"role": "user", "content": order}], "temperature": 0, **given}
    return {field: value for field, value in body.items() if value is not None or field in _OPENAI | _VLLM}


def _row(name: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}
