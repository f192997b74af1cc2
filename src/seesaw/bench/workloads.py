"""Workloads: the prompt and output lengths of a benchmark's requests, and seeded prompts of these lengths."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from importlib.resources import files

from seesaw.core.errors import ConfigError

_NAMED = {"short": "32x512->64", "prefill": "64x1024->16", "decode": "64x64->256"}
_UNIFORM = re.compile(r"([0-9]+)x([0-9]+)->([0-9]+)")
_SHAREGPT = re.compile(r"sharegpt(?::([0-9]+)(?:x([0-9]+))?)?")
_SHAREGPT_REQUESTS, _SHAREGPT_TOKENS = 64, 1024
_SHAREGPT_LONGEST = 2048
"""Most tokens of a conversation in `sharegpt_lengths.csv`."""

FIRST_TOKEN = 3
"""Prompts avoid the ids below, which are usually special."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are handed over all at once; `lengths` are (prompt tokens, output tokens) of each."""

    name: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(output for _, output in self.lengths)

    @property
    def longest(self) -> int:
        """Most tokens of one request, its output included."""
        return max(prompt + output for prompt, output in self.lengths)

    def describe(self) -> str:
        """Requests and tokens in a few words."""
        count = len(self.lengths)
        mean_in, mean_out = self.prompt_tokens / count, self.output_tokens / count
        if len(set(self.lengths)) == 1:
            return f"{count} requests of {mean_in:,.0f} tokens in, {mean_out:,.0f} out"
        return (
            f"{count} requests of {mean_in:,.0f} tokens in and {mean_out:,.0f} out on average, "
            f"the longest of {self.longest:,} in all"
        )

    def prompts(self, vocab: int, seed: int = 0) -> list[list[int]]:
        """Token ids of each prompt, uniform over the vocabulary; the same arguments give the same prompts."""
        rng = random.Random(seed)
        return [[rng.randrange(FIRST_TOKEN, vocab) for _ in range(prompt)] for prompt, _ in self.lengths]

    def outputs(self) -> list[int]:
        """Tokens that each request generates."""
        return [output for _, output in self.lengths]

    def sample(self, requests: int, most_output: int) -> Workload:
        """A few of the requests with short answers, to warm up with."""
        lengths = tuple((prompt, min(output, most_output)) for prompt, output in self.lengths[:requests])
        return Workload(f"{self.name} warm-up", lengths)


def parse_workload(text: str, scale: float = 1.0) -> Workload:
    """Read `short`, `prefill`, `decode`, `sharegpt[:REQUESTS[xTOKENS]]` or `REQUESTSxIN->OUT`.

    `scale` multiplies the number of requests, which stays at least one. Raises `ConfigError`.
    """
    if scale <= 0:
        raise ConfigError(f"scale {scale}: must be greater than 0")
    cleaned = text.strip().replace("→", "->").replace("×", "x")
    match = _UNIFORM.fullmatch(_NAMED.get(cleaned, cleaned))
    if match:
        count, prompt, output = (int(group) for group in match.groups())
        if min(count, prompt, output) < 1:
            raise ConfigError(f"workload {text!r}: requests and tokens must be at least 1")
        return Workload(cleaned, ((prompt, output),) * _scaled(count, scale))
    match = _SHAREGPT.fullmatch(cleaned)
    if match:
        count = int(match.group(1) or _SHAREGPT_REQUESTS)
        limit = int(match.group(2) or _SHAREGPT_TOKENS)
        if count < 1 or not 16 <= limit <= _SHAREGPT_LONGEST:
            raise ConfigError(
                f"workload {text!r}: at least 1 request, and a limit of 16 to {_SHAREGPT_LONGEST} tokens"
            )
        return Workload(cleaned, _sharegpt(_scaled(count, scale), limit))
    raise ConfigError(
        f"workload {text!r}: expected {', '.join(_NAMED)}, sharegpt[:REQUESTS[xTOKENS]], or "
        "REQUESTSxIN->OUT such as 32x512->64"
    )


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _sharegpt(count: int, limit: int) -> tuple[tuple[int, int], ...]:
    """The first `count` pairs of the file (again from its start, if need be), both lengths scaled by the ratio
    that brings the longest conversation of the file to `limit` tokens."""
    text = (files("seesaw.bench") / "sharegpt_lengths.csv").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    ratio = limit / _SHAREGPT_LONGEST
    pairs = [(max(1, int(int(a) * ratio)), max(1, int(int(b) * ratio))) for a, b in csv.reader(lines[1:])]
    return tuple(pairs[i % len(pairs)] for i in range(count))
