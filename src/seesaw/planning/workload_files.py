"""Request lengths out of files: traces in CSV, and job files in JSONL, read a line at a time."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from seesaw.core.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CHARACTERS_PER_TOKEN = 4
"""Of the text of a prompt."""
MESSAGE_TOKENS = 4
"""What a chat template puts around each message."""
CHAT_OUTPUT = 256
"""Tokens of an answer to a chat row that sets no limit: the means of published chat traces are 207 to 343."""
COMPLETION_OUTPUT = 16
"""The default of `max_tokens` for completions, as in a job."""
MOST_ROWS = 1 << 17
"""Most rows of a job file that are kept; of longer ones an even sample."""

_PROMPT = ("contexttokens", "prompt_tokens", "num_prefill_tokens", "input_length")
_OUTPUT = ("generatedtokens", "output_tokens", "num_decode_tokens", "output_length")
_ARRIVAL = ("arrival_s", "arrived_at")
_WHOLE = re.compile(r"0*([1-9][0-9]{0,8})(?:\.0*)?")
_MOST_TOKENS = 10**9 - 1
_MOST_COMPLETIONS = 128
_LINE_BYTES = 64 << 20
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a file says. `represented` is the number of requests that the arrays stand for."""

    prompt: Ints
    output: Ints
    arrival_s: Floats | None
    represented: int
    notes: tuple[str, ...] = ()


# ---- traces ----------------------------------------------------------------------------------------------------


def read_csv(path: Path, limit: int | None) -> Lengths:
    """The requests of a trace, the first `limit` of them. Raises `ConfigError` with the number of the line.

    The first line names the columns; upper and lower case are the same, other columns are ignored. Prompt:
    `ContextTokens`, `prompt_tokens`, `num_prefill_tokens` or `input_length`; output: `GeneratedTokens`,
    `output_tokens`, `num_decode_tokens` or `output_length`; arrival, if any: `arrival_s` or `arrived_at` in
    seconds, or `TIMESTAMP` as date and time, counted from the first request. Requests come out in the order of
    arrival. Lines that are blank or begin with `#` are left out.
    """
    prompt, output, arrival = array("q"), array("q"), array("d")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            trace = _Trace(path, csv.reader(file))
            for values in trace.rows():
                if limit is not None and len(prompt) == limit:
                    break
                prompt.append(trace.tokens(values, trace.prompt))
                output.append(trace.tokens(values, trace.output))
                if trace.arrival is not None:
                    arrival.append(trace.seconds(values, trace.arrival))
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path}: not a text file in UTF-8") from None
    if not prompt:
        raise ConfigError(f"trace {path}: an empty workload: no requests below the line of the column names")
    lengths = np.array(prompt, dtype=np.int64), np.array(output, dtype=np.int64)
    if trace.arrival is None:
        return Lengths(*lengths, None, len(prompt))
    times = np.array(arrival, dtype=np.float64)
    if trace.dated:
        times -= times.min()
    order = np.argsort(times, kind="stable")
    return Lengths(lengths[0][order], lengths[1][order], times[order], len(prompt))


class _Trace:
    """The columns of a CSV file and its rows; complaints name file, line, column and value."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path, self.reader = path, reader
        self.names = next(self.rows(), [])
        columns = {name.strip().casefold(): i for i, name in reversed(list(enumerate(self.names)))}
        self.prompt = self._column(columns, _PROMPT)
        self.output = self._column(columns, _OUTPUT)
        seconds = next((columns[name] for name in _ARRIVAL if name in columns), None)
        self.arrival = columns.get("timestamp") if seconds is None else seconds
        self.dated = seconds is None

    def rows(self) -> Iterator[list[str]]:
        try:
            for values in self.reader:
                if any(value.strip() for value in values) and not values[0].lstrip().startswith("#"):
                    yield values
        except csv.Error as error:
            raise ConfigError(f"trace {self.path}, line {self.reader.line_num}: {error}") from None

    def tokens(self, values: list[str], column: int) -> int:
        text = values[column].strip() if column < len(values) else ""
        match = _WHOLE.fullmatch(text)
        if match is None:
            self._fail(column, text, f"expected a whole number from 1 to {_MOST_TOKENS:,}")
        return int(match.group(1))

    def seconds(self, values: list[str], column: int) -> float:
        text = values[column].strip() if column < len(values) else ""
        try:
            if self.dated:
                return datetime.fromisoformat(text).timestamp()
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            wanted = "a date and time such as 2023-11-16 18:17:03" if self.dated else "seconds, at least 0"
            self._fail(column, text, f"expected {wanted}")
        return value

    def _column(self, columns: dict[str, int], names: tuple[str, ...]) -> int:
        for name in names:
            if name in columns:
                return columns[name]
        found = ", ".join(name.strip() for name in self.names) or "none"
        raise ConfigError(
            f"trace {self.path}, line {max(1, self.reader.line_num)}: the first line must name the columns "
            f"ContextTokens and GeneratedTokens; found {found[:200]}"
        )

    def _fail(self, column: int, text: str, wanted: str) -> NoReturn:
        name = self.names[column].strip()
        raise ConfigError(
            f"trace {self.path}, line {self.reader.line_num}: {name} is {_cut(repr(text))}; {wanted}"
        )


# ---- job files -------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, limit: int | None) -> Lengths:
    """The requests of a job file, the first `limit` of them, in memory that does not grow with the file.

    Rows are OpenAI Batch lines or plain ones. What is assumed: a prompt has a token for each 4 characters of its
    text, and a chat 4 more for each message; the answer is as long as `max_tokens` (or `max_completion_tokens`)
    allows, and where none is set 256 tokens in a chat and 16 in a completion. Lengths given as
    `prompt_token_ids`, as a `prompt` of token ids, or as `prompt_tokens` and `output_tokens` (or under the names
    that a trace has for them) are taken as they are. A row with `n` completions makes n requests. Beyond 131,072
    rows every second, fourth, … is kept.

    A row that cannot be read is left out and noted, as it becomes an error row in the job and does not stop it.
    Raises `ConfigError` if none can be read, with the number of the first line and what is wrong with it.
    """
    kept = _Kept()
    try:
        with path.open("rb") as file:
            for number, line in _lines(file):
                if limit is not None and kept.good >= limit:
                    break
                kept.add(number, line)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not kept.prompt:
        if kept.bad:
            raise ConfigError(f"job file {path}: no row can be used; {kept.first_bad}")
        raise ConfigError(f"job file {path}: an empty workload: the file has no rows")
    times = np.array(kept.completions, dtype=np.int64)
    prompt = np.repeat(np.array(kept.prompt, dtype=np.int64), times)
    output = np.repeat(np.array(kept.output, dtype=np.int64), times)
    represented = len(prompt) if kept.stride == 1 else round(len(prompt) * kept.good / len(kept.prompt))
    return Lengths(prompt, output, None, represented, kept.notes())


@dataclass(slots=True)
class _Kept:
    """Lengths of every `stride`-th row, at most `MOST_ROWS` of them."""

    prompt: array[int] = field(default_factory=lambda: array("q"))
    output: array[int] = field(default_factory=lambda: array("q"))
    completions: array[int] = field(default_factory=lambda: array("q"))
    stride: int = 1
    good: int = 0
    """Rows but those known to be bad; of rows that are passed over, nothing is known."""
    bad: int = 0
    first_bad: str = ""
    estimated: bool = False
    bounded: bool = False

    def add(self, number: int, line: bytes | None) -> None:
        if self.good % self.stride:
            self.good += 1
            return
        try:
            row = _Row.read(line)
        except ValueError as error:
            self.bad += 1
            self.first_bad = self.first_bad or f"line {number}: {error}"
            return
        self.good += 1
        self.estimated |= row.estimated
        self.bounded |= row.bounded
        values = (row.prompt, row.output, row.completions)
        columns = (self.prompt, self.output, self.completions)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
        if len(self.prompt) == MOST_ROWS:
            self.stride *= 2
            for column in columns:
                del column[1::2]

    def notes(self) -> tuple[str, ...]:
        found = []
        if self.estimated:
            found.append(f"prompts estimated at {CHARACTERS_PER_TOKEN} characters a token")
        if self.bounded:
            found.append("answers taken to be as long as max_tokens allows")
        if self.bad:
            rows = "1 row" if self.bad == 1 else f"{self.bad:,} rows"
            found.append(f"{rows} left out that cannot be read ({self.first_bad})")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Row:
    """Lengths of one row."""

    prompt: int
    output: int
    completions: int
    estimated: bool
    """Whether the prompt's length is guessed from its text."""
    bounded: bool
    """Whether the output is a bound, not a count."""

    @classmethod
    def read(cls, line: bytes | None) -> _Row:
        """Raises `ValueError` saying what is wrong with the row."""
        if line is None:
            raise ValueError(f"the line is longer than {_LINE_BYTES >> 20} MiB")
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise ValueError(f"{_cut(repr(line[: 2 * _SHOWN])[1:])} is not JSON") from None
        body = row.get("body", row) if isinstance(row, dict) else row
        if not isinstance(body, dict):
            raise ValueError(f"{_cut(repr(body))} is not an object")
        prompt, output = _count(body, _PROMPT), _count(body, _OUTPUT)
        bounded = output is None
        if output is None:
            default = CHAT_OUTPUT if "messages" in body else COMPLETION_OUTPUT
            output = _count(body, ("max_completion_tokens", "max_tokens")) or default
        completions = _count(body, ("n",)) or 1
        if completions > _MOST_COMPLETIONS:
            raise ValueError(f"n is {completions}; expected at most {_MOST_COMPLETIONS}")
        if prompt is not None:
            return cls(prompt, output, completions, False, bounded)
        length, estimated = _prompt_length(body)
        return cls(length, output, completions, estimated, bounded)


def _count(fields: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these fields that is set, a whole number of at least 1."""
    for name, value in fields.items():
        if name.casefold() in names and value is not None:
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
                raise ValueError(
                    f"{name} is {_cut(repr(value))}; expected a whole number from 1 to {_MOST_TOKENS:,}"
                )
            return value
    return None


def _prompt_length(body: dict[str, Any]) -> tuple[int, bool]:
    """Tokens of the prompt, and whether they are estimated."""
    if body.get("messages") is not None:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f"messages is {_cut(repr(messages))}; expected a list of objects")
        characters = sum(_characters(message.get("content")) for message in messages)
        return _estimate(characters) + MESSAGE_TOKENS * len(messages), True
    name = "prompt_token_ids" if body.get("prompt_token_ids") is not None else "prompt"
    prompt = body.get(name)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return len(prompt), False
    if isinstance(prompt, str) and prompt:
        return _estimate(len(prompt)), True
    if prompt is None:
        raise ValueError("the row has no prompt, messages, prompt_token_ids or prompt_tokens")
    raise ValueError(f"{name} is {_cut(repr(prompt))}; expected text or token ids")


def _characters(content: object) -> int:
    """Of a message: its text, or the text of its parts."""
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    return sum(
        len(part["text"]) for part in parts if isinstance(part, dict) and type(part.get("text")) is str
    )


def _estimate(characters: int) -> int:
    return max(1, -(-characters // CHARACTERS_PER_TOKEN))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbers from 1 and lines that are not blank; None for one that is too long, which is never held whole."""
    number = 0
    while line := file.readline(_LINE_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif line.strip():
            yield number, line


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"workload {path}: cannot be read: {error.strerror or error}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
