"""`SamplingParams`: how the tokens of a request are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

from seesaw.core.errors import RequestError
from seesaw.core.vllm_sampling import own_fields


def _require(condition: bool, param: str, value: object, wanted: str) -> None:
    if not condition:
        raise RequestError(f"{param}={value!r}: {wanted}", code="invalid_value", param=param)


def _checked_by_name(cls: type[SamplingParams]) -> type[SamplingParams]:
    """Have fields that are not ours looked at before dataclasses would say that they are unknown."""
    names, init = tuple(f.name for f in fields(cls)), cls.__init__

    @wraps(init)
    def __init__(self: SamplingParams, **given: Any) -> None:  # noqa: N807
        init(self, **own_fields(given, names))

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_checked_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request; names, meanings and defaults are vLLM's.

    A temperature of 0 is greedy. `seed` fixes the noise of a request; without it the noise is keyed by the
    engine's seed and the request's id, so that it does not depend on the plan or on the batch. `logprobs=k`
    returns the log-probability of each chosen token and of the k most likely ones. `prompt_logprobs=k` does so
    for the tokens of the prompt, from number `prompt_logprobs_start` on; with it `max_tokens` may be 0, which
    scores the prompt and generates nothing. `max_tokens=None` leaves it to the context. Fields of vLLM's that are
    not here are refused where they ask for something (`core.vllm_sampling`). Raises `RequestError` naming the field
    that cannot be used.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 considers the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    detokenize: bool = True
    """False leaves the text of outputs empty."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_counts()
        self._check_numbers()
        _require(all(s for s in self.stop), "stop", self.stop, "stop strings must not be empty")
        _require(self.detokenize or not self.stop, "detokenize", False, "stop strings need the text")

    def _check_counts(self) -> None:
        self._check_scoring()
        for name in ("n",) if self.max_tokens == 0 else ("n", "max_tokens"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value >= 1, name, value, "must be a whole number of at least 1"
            )
        for name, low in (("min_tokens", 0), ("top_k", -1), ("prompt_logprobs_start", 0)):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= low, name, value, f"must be a whole number ≥ {low}")
        _require(
            self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "must not exceed max_tokens"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, int) and 0 <= value <= 20)
            _require(ok, name, value, "must be between 0 and 20")
        if self.seed is not None:
            _require(isinstance(self.seed, int), "seed", self.seed, "must be a whole number")

    def _check_scoring(self) -> None:
        if self.scores_only:
            wanted = "must be at least 1, unless prompt_logprobs are asked for and nothing else"
            _require(self.prompt_logprobs is not None and self.n == 1, "max_tokens", self.max_tokens, wanted)

    def _check_numbers(self) -> None:
        limits = (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        )
        for name, low, high in limits:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(number and low <= value <= high, name, value, f"must be a number from {low} to {high}")
        _require(self.top_p > 0.0, "top_p", self.top_p, "must be greater than 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def scores_only(self) -> bool:
        """Whether nothing is generated."""
        return self.max_tokens == 0

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
