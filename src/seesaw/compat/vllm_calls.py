"""What vLLM's `LLM` can be asked beside its prompts: arguments of its methods, keys of prompts, methods we lack."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from seesaw.core.errors import RequestError
from seesaw.core.foreign import Foreign, refused, take_own, without_effect

_TEXT_ONLY = "only text and token ids go into models here; keep vLLM for these prompts"
_GENERATES = "this engine generates text only; keep vLLM for embeddings, scores and classes"
_TOKENISED = (
    "prompts are tokenised as the tokeniser is set up; tokenise them yourself and give prompt_token_ids"
)

_CALL: dict[str, Foreign] = {
    **refused("there are no LoRA adapters; merge the adapter into the weights first", "lora_request"),
    **refused(_TOKENISED, "tokenization_kwargs"),
    **refused(_TEXT_ONLY, "mm_processor_kwargs"),
    **refused("give prompts=[{'prompt_token_ids': ids}, …]", "prompt_token_ids"),
    **refused("answers cannot be constrained here yet", "guided_options_request"),
    **refused("content parts are joined as text", "chat_template_content_format", neutral=("auto", "string")),
    **without_effect("rows run in the order in which they come", "priority", neutral=(0,)),
}
_PROMPT_KEYS = refused(
    _TEXT_ONLY, "multi_modal_data", "mm_processor_kwargs", "prompt_embeds", "encoder_prompt", "decoder_prompt"
)
_METHODS: dict[str, str] = {
    **dict.fromkeys(("embed", "encode", "classify", "score", "reward"), _GENERATES),
    "beam_search": "there is no beam search; generate with n completions and choose among them",
    **dict.fromkeys(
        ("enqueue", "enqueue_chat", "wait_for_completion"),
        "give generate an iterator: it is read as there is room",
    ),
    **dict.fromkeys(("sleep", "wake_up"), "close the engine and make a new one: that takes seconds"),
    **dict.fromkeys(("collective_rpc", "apply_model", "llm_engine"), "the ranks run no code of one's own"),
    **dict.fromkeys(("start_profile", "stop_profile"), "use LLM(trace=…) or LLM(profile=…)"),
    "get_metrics": "use stats()",
    "set_tokenizer": "give LLM(tokenizer=…)",
    "reset_prefix_cache": "there is no prefix cache",
}


def check_call(method: str, given: Mapping[str, Any], *, others: bool = False) -> dict[str, Any]:
    """Arguments of a call that only vLLM knows: refused with `RequestError`, or warned of where without effect.

    Returns the `others`, which nobody knows; unless they are allowed, they are refused as well.
    """
    own = [name for name in given if name not in _CALL] if others else []
    taken, notes = take_own(
        given,
        own,
        _CALL,
        lambda sentence, name: RequestError(
            f"{method}: {sentence}", code="unsupported_parameter", param=name
        ),
    )
    if notes:
        warnings.warn(f"{method}: without effect here: {', '.join(notes)}", UserWarning, stacklevel=3)
    return taken


def check_prompt(prompt: Mapping[str, Any]) -> None:
    """Raise `RequestError` for a prompt that holds more than text or tokens."""
    for name, value in prompt.items():
        if name in _PROMPT_KEYS and _PROMPT_KEYS[name].asks(value):
            raise RequestError(f"{name}: {_TEXT_ONLY}", code="unsupported_parameter", param=name)


def missing(name: str) -> AttributeError:
    """The error for an attribute that `LLM` lacks."""
    reason = f": {_METHODS[name]}" if name in _METHODS else ""
    return AttributeError(f"LLM has no {name!r}{reason}")
