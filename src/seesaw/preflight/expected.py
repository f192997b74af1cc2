"""How much a job will write, from a look at the beginning of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

LEAST_BYTES = 160
"""Of any line, one that says a row could not be read included."""
LINE_BYTES = 420
"""Of an answer's line: what it has besides text."""
TOKEN_BYTES = 5.0
"""Of text, for a generated token; English has about 4.5."""
LOGPROB_BYTES = 120.0
"""For each alternative of a token whose log-probabilities are asked for."""
_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 1024
"""Most tokens of a row that does not say: what a completion gets; what a chat is taken for."""
_LOOK_BYTES = 256 << 10
_PACKED = {".gz": 5, ".zst": 5, ".parquet": 5}
"""By ending, how often larger the rows are than the file."""
_LINES = (".jsonl", ".json", ".ndjson", ".txt", "")
"""Endings of files whose lines have the sizes above."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Estimates of what a job writes."""

    rows: int
    least: float
    """Bytes that a row takes at least."""
    most: float
    """Bytes that a row takes if it generates all tokens it may."""

    def as_written(self, output: Path) -> Expected:
        """In a file of that name: other formats take less than lines of JSON, how much less is not known."""
        if output.suffix in _LINES:
            return self
        return replace(self, least=0.0, most=self.most / _PACKED.get(output.suffix, 1))


def input_bytes(inputs: Sequence[Path]) -> int | None:
    """Bytes of rows in all inputs, about; None where an input is a pipe, or is not there."""
    total = 0
    for path in inputs:
        if not path.is_file():
            return None
        total += path.stat().st_size * _PACKED.get(path.suffix, 1)
    return total


def expect(inputs: Sequence[Path], limit: int | None) -> Expected | None:
    """By the first rows of the first input; None where they cannot be looked at without reading it all.

    `limit` is the most rows that the job takes.
    """
    total = input_bytes(inputs)
    first = inputs[0]
    if not total or first.suffix not in _LINES:
        return None
    with first.open("rb") as file:
        beginning = file.read(_LOOK_BYTES)
    whole = beginning if len(beginning) < _LOOK_BYTES else beginning[: beginning.rfind(b"\n") + 1]
    lines = [line for line in whole.splitlines() if line.strip()]
    if not lines:
        return None
    rows = round(total / (len(whole) / len(lines)))
    return Expected(
        rows=rows if limit is None else min(rows, limit),
        least=LEAST_BYTES,
        most=LINE_BYTES + sum(_answer_bytes(line) for line in lines) / len(lines),
    )


def _answer_bytes(line: bytes) -> float:
    """Bytes of the text that a row may get; of one that cannot be read, none."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0.0
    if not isinstance(row, dict):
        return 0.0
    body = row.get("body", row)
    if not isinstance(body, dict):
        return 0.0
    default = _CHAT_TOKENS if "messages" in body else _COMPLETION_TOKENS
    tokens = _number(body, "max_tokens", _number(body, "max_completion_tokens", default))
    logprobs = body.get("logprobs")
    alternatives = _number(body, "top_logprobs", 0) + 1 if logprobs is True else _number(body, "logprobs", 0)
    return tokens * _number(body, "n", 1) * (TOKEN_BYTES + LOGPROB_BYTES * alternatives)


def _number(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    return value if type(value) is int and 0 < value < 1 << 24 else default
