"""Which columns of a table are what, and cells made into the fields of a request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from seesaw.core.errors import JobError
from seesaw.jobs.base import Endpoint
from seesaw.jobs.fields import parameter_names
from seesaw.jobs.reader import Parsed, RecordError, shown, text_id
from seesaw.jobs.sources.base import ColumnNames

CONTENT_FIELDS = ("prompt", "messages", "prompt_token_ids")
_ID_COLUMNS = ("custom_id", "id")
_JSON_CONTENT = ("messages", "prompt_token_ids")
_MOST_NAMED = 30


def content_field(column: str, value: object) -> tuple[str, Any]:
    """The field of a request that `value`, from the prompt column, goes into, and what it holds.

    Text is a prompt; of a column that is called `messages` or `prompt_token_ids`, it is their JSON. A list of
    objects is messages, any other list token ids. Raises `RecordError`.
    """
    if column in _JSON_CONTENT:
        return column, _json(column, value) if isinstance(value, str) else value
    if isinstance(value, list):
        return ("messages" if value and isinstance(value[0], dict) else "prompt_token_ids"), value
    return "prompt", value


class TableColumns:
    """What the columns `names` of the table `path` are.

    Raises `JobError` where there is no prompt column, more than one, a name twice, or a column asked for is missing.
    """

    def __init__(self, path: Path, names: Sequence[str], wanted: ColumnNames) -> None:
        self._path, self._names = path, names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise JobError(f"{path}: more than one column is named {twice!r}")
        for option, name in (
            ("prompt", wanted.prompt),
            ("id", wanted.id),
            *(("keep", k) for k in wanted.keep),
        ):
            if name is not None and name not in names:
                raise JobError(f"{path}: has no column {name!r} (--{option}-column); {self._listed()}")
        self.prompt = wanted.prompt or self._default_prompt()
        self.id = wanted.id or next((name for name in _ID_COLUMNS if name in names), None)
        if self.id == self.prompt:
            self.id = wanted.id
        rest = [name for name in names if name not in (self.prompt, self.id)]
        known = parameter_names()
        self.parameters = [name for name in rest if name in known and name not in wanted.keep]
        self.extra = list(dict.fromkeys(wanted.keep)) or [n for n in rest if n not in self.parameters]

    @property
    def used(self) -> list[str]:
        """The columns that matter, in the order of the file."""
        used = {self.prompt, self.id, *self.parameters, *self.extra}
        return [name for name in self._names if name in used]

    def describe(self) -> str:
        """In words, for a log line."""
        pieces = [f"prompts from {self.prompt}", f"ids from {self.id}" if self.id else "ids by row number"]
        if self.parameters:
            pieces.append(f"parameters from {', '.join(self.parameters)}")
        if self.extra:
            pieces.append(f"passed through: {_some(self.extra)}")
        if self.prompt not in _JSON_CONTENT:  # what surprises whoever has a model for chats
            few = "" if "max_tokens" in self.parameters else ", by few tokens (there is no column max_tokens)"
            pieces.append(f"text is completed as it stands, without the chat template{few}")
        return "; ".join(pieces)

    def parse(self, values: dict[str, Any]) -> Parsed:
        """The request of one row, whose `values` are JSON-able; None and "" mean that a cell is not set.

        Raises `RecordError`.
        """
        row_id = None if self.id is None else _row_id(self.id, values[self.id])
        try:
            name, content = content_field(self.prompt, values[self.prompt])
        except RecordError as error:
            error.row_id = row_id
            raise
        body = {name: content}
        for name in self.parameters:
            value = values[name]
            if value is not None and value != "":
                body[name] = _parameter(name, value) if isinstance(value, str) else value
        endpoint = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETIONS
        return Parsed(row_id, endpoint, body, extra={name: values[name] for name in self.extra})

    def _default_prompt(self) -> str:
        found = [name for name in CONTENT_FIELDS if name in self._names]
        if not found:
            raise JobError(
                f"{self._path}: none of its columns is named prompt, messages or prompt_token_ids; choose one "
                f"with --prompt-column; {self._listed()}"
            )
        if len(found) > 1:
            raise JobError(
                f"{self._path}: {' and '.join(found)} may both hold the prompts; choose one with --prompt-column"
            )
        return found[0]

    def _listed(self) -> str:
        return f"the columns are {_some([repr(name) for name in self._names])}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _row_id(name: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # data frames write whole numbers so beside gaps
        value = int(value)
    return text_id(name, str(value) if type(value) is int else value)


def _json(column: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise RecordError(
            "invalid_json", f"{column}={shown(text)}: not valid JSON ({reason})", column
        ) from error


def _parameter(name: str, text: str) -> Any:
    """What the text of a cell means: JSON, as far as it is; a stop string is text unless it is a list."""
    if name == "stop" and not text.startswith("["):
        return text
    plain = text.strip()
    if plain.lower() in ("true", "false"):
        return plain.lower() == "true"
    try:
        return msgspec.json.decode(plain)
    except (msgspec.DecodeError, RecursionError):
        return text  # for the check of the parameter to refuse
