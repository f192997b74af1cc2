"""Fields of vLLM's `SamplingParams` beside our own: refused, or without effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from seesaw.core.errors import RequestError
from seesaw.core.foreign import Foreign, refused, take_own, without_effect

UNBOUNDED = (1 << 31) - 1
"""Stands for `max_tokens=None`: as many as the context leaves room for."""

_ONE = (1, 1.0)
_SWITCHES = "tokens cannot be forced or forbidden here yet; leave it out, or keep these prompts in vLLM"
_CONSTRAINED = (
    "answers cannot be constrained to a grammar or schema here yet; leave it out and check the answers, or keep "
    "these prompts in vLLM"
)
_PROMPT = (
    "only the prompt's own tokens and the most likely ones can be asked for; use prompt_logprobs, at most 20"
)

FOREIGN: dict[str, Foreign] = {
    **refused(_SWITCHES, "logit_bias", "allowed_token_ids", "bad_words", "trace_decode_token_ids"),
    **refused(_CONSTRAINED, "structured_outputs", "guided_decoding"),
    **refused(_PROMPT, "prompt_logprob_token_ids"),
    **refused("only the most likely tokens can be asked for; use logprobs, at most 20", "logprob_token_ids"),
    **refused(
        "only as many completions are made as are asked for; use n and choose among them",
        "best_of",
        neutral=_ONE,
    ),
    **refused("there is no beam search; leave it out", "use_beam_search", "early_stopping"),
    **refused("there is no beam search; leave it out", "length_penalty", neutral=_ONE),
    **refused("code of one's own does not run on the ranks; leave it out", "logits_processors", "extra_args"),
    **refused("cut the prompt before it is given", "truncate_prompt_tokens"),
    **refused(
        "thinking is not bounded apart; bound it all with max_tokens", "thinking_token_budget", neutral=(-1,)
    ),
    **refused(
        "answers that repeat themselves are not ended early; bound them with max_tokens",
        "repetition_detection",
    ),
    **refused("answers are not watermarked", "watermarking"),
    **without_effect(
        "log-probabilities come as a list of dictionaries, which reads the same", "flat_logprobs"
    ),
    **without_effect("routed experts are not returned", "routed_experts_prompt_start", neutral=(0,)),
    **without_effect("there is no prefix cache", "skip_reading_prefix_cache"),
}
"""By name."""

_MEANINGLESS = frozenset({"output_kind", "stream_interval", "skip_clone", "spaces_between_special_tokens"})
"""About outputs in the making, which vLLM's `LLM` never shows either, or a copy that it makes; and spaces between
special tokens, where these are not shown."""


def own_fields(given: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """The fields of `SamplingParams` that `given` asks for, spelled our way.

    Raises `RequestError` for a field that is refused or that nobody knows, and warns once of those without effect.
    """
    _check_spaces(given)
    asked = {name: value for name, value in given.items() if name not in _MEANINGLESS}
    if "prompt_logprob_start" in asked:
        asked["prompt_logprobs_start"] = asked.pop("prompt_logprob_start") or 0
    if "best_of" in asked and asked["best_of"] == asked.get("n", 1):
        del asked["best_of"]
    fields, notes = take_own(asked, own, FOREIGN, _refusal)
    if notes:
        warnings.warn(f"SamplingParams: without effect here: {', '.join(notes)}", UserWarning, stacklevel=4)
    if "max_tokens" in fields and fields["max_tokens"] is None:
        fields["max_tokens"] = UNBOUNDED
    if fields.get("seed") == -1:
        fields["seed"] = None
    return fields


def _check_spaces(given: Mapping[str, Any]) -> None:
    if given.get("spaces_between_special_tokens", True) is False and not given.get(
        "skip_special_tokens", True
    ):
        raise _refusal(
            "spaces_between_special_tokens=False: special tokens are shown with the tokeniser's own spaces; leave "
            "it out, or skip them",
            "spaces_between_special_tokens",
        )


def _refusal(sentence: str, name: str) -> RequestError:
    return RequestError(f"SamplingParams: {sentence}", code="unsupported_parameter", param=name)
