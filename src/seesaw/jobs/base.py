"""What a job is made of: the engine it runs on, its rows, its options, its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from seesaw.core.errors import JobError
from seesaw.core.request import Request, RequestOutput
from seesaw.core.stats import EngineStats

STDIN = Path("-")
"""Stands for standard input among the inputs of a job."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Compressions by suffix."""


def stem(path: Path) -> str:
    """The name of a file without the suffixes of its format and compression."""
    return path.with_suffix("").stem if path.suffix.lower() in COMPRESSED else path.stem


class Encoder(Protocol):
    """What a job needs of a tokeniser (`seesaw.text.Tokenizer`). Both methods raise `RequestError`."""

    def encode(self, text: str) -> list[int]: ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]: ...


class JobEngine(Protocol):
    """What a job needs of `seesaw.LLM`.

    `run` pulls requests lazily and boundedly, on any one thread, and yields each exactly once when it is
    finished; the iterator may have a length hint (`operator.length_hint`).
    `stats` may be called from another thread while `run` is being iterated.
    """

    @property
    def tokenizer(self) -> Encoder | None: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def busy_cores(self) -> int:
        """Cores of this machine that the ranks keep busy."""
        ...

    def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]: ...

    def stats(self) -> EngineStats: ...


class Endpoint(Enum):
    """The OpenAI endpoint whose parameters a row has and in whose shape it is answered."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"

    __hash__ = object.__hash__
    """Of the member itself: an enum's own looks its name up each time."""


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line that has the outer shape of a request. `body` is as it stands in the file, unchecked."""

    number: int
    """1-based position among the rows of all inputs of the job."""
    place: str
    """Where it stands, for messages: `line 12` or `row 12`, or `b.jsonl: line 12` where there are several inputs."""
    digest: int
    """CRC-32 of its bytes (Parquet: of its values as JSON), by which a resumed job knows it again."""
    id: str
    """The row's own id, or `line-N` (JSONL), `row-N` (tables), `b.jsonl:line-N` (one of several inputs)."""
    endpoint: Endpoint
    body: dict[str, Any]
    plain: bool = False
    """Whether it is a plain line, or of a table, rather than a line in OpenAI's Batch format."""
    extra: dict[str, Any] = {}
    """What passes through to the row's line of the output: JSON-able, by column."""


class RowFailure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row that gets an error line. `message` names its place; `code` is stable and machine-readable."""

    number: int
    """As of `Row`, like `digest`."""
    digest: int
    id: str
    """The row's own id, or `line-N` where none could be read."""
    code: str
    message: str
    param: str | None = None
    status: int | None = None
    """HTTP status if the line was a request; None if it never became one (malformed, duplicate, …)."""
    extra: dict[str, Any] = {}
    """As of `Row`; empty where the row could not be read."""


class RowReader(Protocol):
    """The rows of a job's inputs, once, in order; in memory that grows only by the digests of their ids.

    Iterating raises `JobError` where an input cannot be read.
    """

    def __iter__(self) -> Iterator[Row | RowFailure]: ...

    @property
    def total(self) -> int | None:
        """Rows in all, or a little more (blank lines are counted); None until known, or where it cannot be."""
        ...

    def left(self, read: int) -> int | None:
        """Rows still to come after `read` of them, as far as can be told; may be asked from any thread."""
        ...

    def close(self) -> None:
        """Close the inputs. May be called twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Which files, and how the model is named in them."""

    input: Path | tuple[Path, ...]
    """One file, or several that are read one after the other. `-` is standard input."""
    output: Path | None = None
    """Answers, in the format its suffix names; `<name of the first input>.output.jsonl` beside it if None, standard
    output if `-`."""
    errors: Path | None = None
    """Failed rows; `<output stem>.errors.jsonl` beside the output if None, or with the answers on standard output.
    Created only if a row fails."""
    model: str
    """Name of the model, written into every answer."""
    model_folder: Path | None = None
    """Where the model lies, if that is not its name."""
    max_tokens: int | None = None
    """Of rows that do not say."""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `SamplingParams` where a row leaves them open."""
    served_model_name: str | None = None
    """The name to write instead. Then rows may name no other model than these two."""
    prompt_column: str | None = None
    """Column (of plain lines: field) with the prompts, if it is not `prompt`, `messages`, `prompt_token_ids`."""
    id_column: str | None = None
    """Column or field with the ids, if it is not `custom_id` or `id`."""
    keep_columns: tuple[str, ...] = ()
    """Columns or fields that pass through to the output; none given, all of a table that mean nothing else."""
    limit: int | None = None
    """Take only the first rows; blank lines do not count."""
    ordered: bool = False
    """Put the finished files into the order of the input."""
    retry_errors: bool = False
    """Run rows again that failed before; answered ones stay."""
    force: bool = False
    """Replace files of something else, and go on with a job although what it depends on has changed."""
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    """Options of the engine that decide the answers, by name: a job is continued with the same ones only."""
    progress_seconds: float = 0.5
    """Time between two progress reports."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The input files, in order."""
        return (self.input,) if isinstance(self.input, Path) else self.input

    @property
    def streamed(self) -> bool:
        """Whether answers go to standard output: nothing is kept, and the job cannot be continued."""
        return self.output is not None and str(self.output) == "-"

    @property
    def output_path(self) -> Path:
        """Where answers go. Raises `JobError` if standard input comes first and no output is named."""
        if self.output is not None:
            return self.output
        first = self.inputs[0]
        if first == STDIN:
            raise JobError("the input is standard input; name the output with --output")
        return first.parent / f"{stem(first)}.output.jsonl"

    @property
    def errors_path(self) -> Path:
        """Where failed rows go."""
        output = self.output_path
        return self.errors or output.with_name(f"{stem(output)}.errors.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """Where a job stands. Rows are those read so far, blank lines not counted."""

    rows_answered: int
    rows_failed: int
    rows_before: int = 0
    """How many of these were done in earlier sessions."""
    rows_total: int | None
    """Rows in the file, by its newlines; None until they are counted, or where they cannot be."""
    elapsed_seconds: float
    stats: EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """How a job ended: `rows_answered` lines in `output`, `rows_failed` lines in `errors`."""

    rows_answered: int
    rows_failed: int
    rows_before: int = 0
    """How many of these were done in earlier sessions of the job."""
    failures: dict[str, int] = field(default_factory=dict)
    """Failed rows by code."""
    elapsed_seconds: float
    interrupted: bool
    output: Path
    """The finished file; after an interruption `OUTPUT.part` with what was answered; `-` for standard output."""
    errors: Path | None
    """None if no row failed, or they are with the answers."""
    stats: EngineStats

    @property
    def rows(self) -> int:
        """Rows that have their line."""
        return self.rows_answered + self.rows_failed

    @property
    def exit_code(self) -> int:
        """0 if every row was answered, 1 if some failed, 3 if the job was interrupted."""
        if self.interrupted:
            return 3
        return 1 if self.rows_failed else 0
