"""What a task of the evaluation harness says of generation, as `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from seesaw import SamplingParams
from seesaw.core.errors import ConfigError

_TAKEN = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_RENAMED = {"min_new_tokens": "min_tokens", "min_tokens": "min_tokens"}
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True, False),
    "early_stopping": (False,),
    "length_penalty": (1,),
}
"""Arguments of transformers' `generate` that are accepted with values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One request's settings."""

    until: list[str]
    """Texts that end an answer, the end-of-sequence token's among them."""
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    """Those of `until` that are special tokens: texts that are decoded without."""
    others: dict[str, Any]

    @classmethod
    def read(cls, arguments: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> Generation:
        """From a task's `generation_kwargs`. Raises `ConfigError` for one that cannot be followed."""
        left = dict(normalize_gen_kwargs(dict(arguments), max_tokens))
        eos = tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
        until = [text for text in handle_stop_sequences(left.pop("until"), eos=eos) if text]
        special = [
            tokenizer.convert_tokens_to_ids(text) for text in until if text in tokenizer.all_special_tokens
        ]
        most, sampled = int(left.pop("max_gen_toks")), left.pop("do_sample")
        temperature = float(left.pop("temperature", 1.0)) if sampled else 0.0
        left.pop("temperature", None)
        others = _others(left)
        return cls(until, most, temperature, tuple(special), others)

    def sampling(self, *, thinks: bool) -> SamplingParams:
        """For the engine. Stop strings may occur in what a model thinks before it answers, so they are left out
        then."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            stop=() if thinks else tuple(self.until),
            stop_token_ids=() if thinks else self.stop_token_ids,
            **self.others,
        )


def _others(left: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the same meaning under the engine's names."""
    found: dict[str, Any] = {}
    for name, value in left.items():
        if name in _TAKEN:
            found[name] = value
        elif name in _RENAMED:
            found[_RENAMED[name]] = value
        elif value not in _WITHOUT_EFFECT.get(name, ()):
            known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *_TAKEN, "min_tokens"))
            raise ConfigError(f"generation_kwargs: {name}={value!r} cannot be followed; known are {known}")
    return found
