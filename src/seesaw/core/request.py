"""What goes into the engine, `Request`, and what comes out, `RequestOutput`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import msgspec

from seesaw.core.errors import RequestError
from seesaw.core.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]
    """Its text, for the output."""


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A prompt and its sampling parameters.

    `id` names the request in outputs and, with the engine's seed, keys its sampling noise: the same id gives
    the same noise under any plan.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    prompt: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """Log-probability of a token (natural logarithm) and its rank in the vocabulary, 1 being most likely."""

    logprob: float
    rank: int | None = None
    text: str | None = None

    @property
    def decoded_token(self) -> str | None:
        """vLLM's name for `text`."""
        return self.text


class CompletionOutput(msgspec.Struct, kw_only=True, gc=False):
    """One of the `n` completions of a request.

    `logprobs[i]` maps token ids to their log-probabilities at position i: the chosen token first, then the
    most likely ones. `stop_reason` is the stop string or stop token id that ended it, if one did.
    """

    index: int
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, TokenLogprob]] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of all tokens together; None unless log-probabilities were asked for."""
        if self.logprobs is None:
            return None
        return sum(at[token].logprob for token, at in zip(self.token_ids, self.logprobs, strict=True))


class RequestOutput(msgspec.Struct, kw_only=True):
    """What became of a request: its completions, or the error that refused it (then `outputs` is empty).

    `prompt_logprobs`, if asked for, has an entry for each token of the prompt: None where there is nothing to
    predict it from (the first) or it was not wanted, else as in `CompletionOutput.logprobs`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    """A tuple; of `LLM.generate` and `LLM.chat` a list, to be joined with `token_ids`."""
    outputs: list[CompletionOutput] = []
    error: RequestError | None = None
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """Always true: outputs are delivered when whole."""
        return True
