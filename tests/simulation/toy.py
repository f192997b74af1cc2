"""A model whose next token depends on all the KV that it reads, a tokeniser for it, and what they must answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from seesaw.core.actions import ChosenToken
from seesaw.core.noise import noise_key
from seesaw.core.request import Request, TokenLogprob

VOCAB = 61
MODEL_EOS, TOKENIZER_EOS = 0, 1
UNWRITTEN = 255
"""What memory holds where no token was written; no token is so large."""
_LETTERS = "abcde"
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token and what is said of its probability."""

    token: int
    choice: ChosenToken


def sample(prefix: bytes, noise: int, index: int, banned: Sequence[int], top: int) -> Sampled:
    """The token after `prefix`, number `index` of its sequence. `noise` is 0 where the choice is greedy."""
    state = crc32(prefix, (noise + 7919 * index) & _MASK if noise else 0)
    token = state % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    others = [((token + 1 + i) % VOCAB, -float(i)) for i in range(max(top, 0))]
    return Sampled(token, ChosenToken(-(state % 997) / 100, 1 + state % 5, others))


class ToyTokenizer:
    """One letter a token, of an alphabet so small that stop strings are met; special tokens say nothing."""

    eos_token_ids = (TOKENIZER_EOS,)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        kept = (i for i in ids if i > TOKENIZER_EOS or not skip_special_tokens)
        return "".join("<>"[i] if i <= TOKENIZER_EOS else _LETTERS[i % 5] for i in kept)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one completion must be."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    logprobs: tuple[dict[int, TokenLogprob], ...] | None


def answers(request: Request, max_model_len: int, *, seed: int, speaks: bool) -> list[Answer] | str:
    """What `request` must come to, or the code of its refusal. `speaks` says whether there is a tokeniser."""
    prompt, params = request.prompt_token_ids, request.sampling
    if any(not 0 <= token < VOCAB for token in prompt):
        return "invalid_token"
    if params.stop and not speaks:
        return "no_tokenizer"
    if not prompt:
        return "empty_prompt"
    if len(prompt) + 1 > max_model_len:
        return "context_length_exceeded"
    return [_answer(request, i, max_model_len, seed, speaks) for i in range(params.n)]


def _answer(request: Request, index: int, max_model_len: int, seed: int, speaks: bool) -> Answer:
    params, prompt = request.sampling, bytes(request.prompt_token_ids)
    ending = stop_ids(request, speaks)
    noise = 0 if params.greedy else noise_key(seed, request.id, index, params.seed)
    limit = min(params.max_tokens, max_model_len - len(prompt))
    tokens: list[int] = []
    choices: list[ChosenToken] = []
    tokenizer = ToyTokenizer() if speaks else None
    finish, stop = "length", None
    text, found = "", -1
    while finish == "length" and len(tokens) < limit:
        banned = tuple(ending) if len(tokens) < params.min_tokens else ()
        new = sample(prompt + bytes(tokens), noise, len(tokens), banned, params.logprobs or 0)
        tokens.append(new.token)
        choices.append(new.choice)
        if new.token in ending and len(tokens) > params.min_tokens:
            finish, stop = "stop", new.token if new.token in params.stop_token_ids else None
            if not params.include_stop_str_in_output:
                continue
        if tokenizer is None:
            continue
        before, text = len(text), tokenizer.decode(tokens, params.skip_special_tokens)
        if len(tokens) > params.min_tokens and len(text) > before:
            ends = [(text.find(s, max(0, before - len(s) + 1)), s) for s in params.stop]
            hits = sorted((at + len(s), at, s) for at, s in ends if at >= 0)
            if hits:
                end, at, stop = hits[0]
                finish, found = "stop", end if params.include_stop_str_in_output else at
    logprobs = None
    if params.logprobs is not None:
        logprobs = tuple(_entry(t, c, tokenizer) for t, c in zip(tokens, choices, strict=True))
    return Answer(tuple(tokens), text if found < 0 else text[:found], finish, stop, logprobs)


def _entry(token: int, choice: ChosenToken, tokenizer: ToyTokenizer | None) -> dict[int, TokenLogprob]:
    def said(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)

    top = {
        other: TokenLogprob(p, i, said(other)) for i, (other, p) in enumerate(choice.top, 1) if other != token
    }
    return {token: TokenLogprob(choice.logprob, choice.rank, said(token)), **top}


def stop_ids(request: Request, speaks: bool) -> frozenset[int]:
    """Tokens that end a completion of `request`."""
    own = frozenset(request.sampling.stop_token_ids)
    if request.sampling.ignore_eos:
        return own
    return own | {MODEL_EOS} | ({TOKENIZER_EOS} if speaks else frozenset())
