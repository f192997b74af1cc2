"""`JsonLines`: OpenAI Batch lines and plain lines, read one at a time.

Whatever bytes a line holds, it becomes one record; only blank lines vanish.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import msgspec

from seesaw.core.units import format_bytes
from seesaw.jobs.base import Endpoint
from seesaw.jobs.lines import MAX_LINE_BYTES, count_lines, read_lines
from seesaw.jobs.reader import Parsed, Record, RecordError, Unit, kind, shown, text_id
from seesaw.jobs.sources.base import ColumnNames
from seesaw.jobs.sources.columns import CONTENT_FIELDS, content_field
from seesaw.jobs.sources.streams import InputStream

_ENVELOPE = frozenset(("method", "url", "body"))
_BATCH_FIELDS = {"custom_id", *_ENVELOPE}
_ID_FIELDS = ("custom_id", "id")
_URLS = {endpoint.value: endpoint for endpoint in Endpoint}


class JsonLines:
    """See `Source`."""

    unit: Unit = "line"

    def __init__(self, path: Path, stream: InputStream, names: ColumnNames) -> None:
        self._path, self._stream, self._names = path, stream, names

    def describe(self) -> str | None:
        """See `Source`."""
        return None

    def records(self) -> Iterator[Record]:
        """See `Source`."""
        return json_records(self._stream.reader, self._names)

    def share(self) -> float | None:
        """See `Source`."""
        return self._stream.share()

    def count(self, stop: threading.Event) -> int | None:
        """Lines of the file, unless it is compressed."""
        return None if self._stream.compression is not None else count_lines(self._path, stop)

    def close(self) -> None:
        """See `Source`."""
        self._stream.close()


def json_records(
    file: BinaryIO, names: ColumnNames | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Record]:
    """The lines of a job file, in constant memory.

    A line with `method`, `url` or `body` is in OpenAI's Batch format; any other object is a plain row, whose
    fields are those of the body, with `id` or `custom_id` beside them.
    """
    names = names or ColumnNames()
    for number, line in read_lines(file, max_bytes=max_line_bytes):
        digest = 0 if line is None else crc32(line)
        content: Parsed | RecordError
        try:
            if line is None:
                most = format_bytes(max_line_bytes)
                raise RecordError("line_too_long", f"the line has more than {most}, the most that is read")
            content = _parse(_decode(line, number), names)
        except RecordError as error:
            content = error
        yield Record(number, digest, content)


def _decode(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(line)
    except RecursionError as error:
        raise RecordError("invalid_json", "the JSON is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(line, number, error) from error
    if not isinstance(value, dict):
        raise RecordError("invalid_json", f"expected a JSON object, found {kind(value)}")
    return value


def _malformed(line: bytes, number: int, reason: Exception) -> RecordError:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; the file looks like UTF-16, save it as UTF-8" if utf16 else ""
        return RecordError("invalid_utf8", f"byte {error.start + 1} of the line is not UTF-8{hint}")
    return RecordError("invalid_json", f"not valid JSON ({str(reason).removeprefix('JSON is malformed: ')})")


def _parse(fields: dict[str, Any], names: ColumnNames) -> Parsed:
    batch = not _ENVELOPE.isdisjoint(fields)
    row_id = _own_id(fields, batch, names.id)
    try:
        extra = {name: fields[name] for name in names.keep if name in fields} if names.keep else {}
        return _batch(row_id, fields, extra) if batch else _plain(row_id, fields, extra, names)
    except RecordError as error:
        error.row_id = row_id
        raise


def _own_id(fields: dict[str, Any], batch: bool, column: str | None) -> str | None:
    """The id a row carries; None for a plain row without one."""
    if batch:
        if "custom_id" not in fields:
            raise RecordError(
                "missing_custom_id", "custom_id is missing; a Batch line must have one", "custom_id"
            )
        return text_id("custom_id", fields["custom_id"])
    found: str | None = None
    for name in _ID_FIELDS if column is None else (column,):
        value = fields.get(name)
        if value is None:
            continue
        row_id = text_id(name, str(value) if type(value) is int else value)
        if found is not None and found != row_id:
            raise RecordError(
                "invalid_custom_id", f"custom_id {shown(found)} and id {shown(row_id)} differ; give one"
            )
        found = row_id
    return found


def _batch(row_id: str | None, fields: dict[str, Any], extra: dict[str, Any]) -> Parsed:
    unknown = next((name for name in fields if name not in _BATCH_FIELDS and name not in extra), None)
    if unknown is not None:
        raise RecordError(
            "unknown_parameter",
            f"unknown field {shown(unknown)} of a Batch line; parameters go into its body",
            unknown,
        )
    if fields.get("method") != "POST":
        found = shown(fields["method"]) if "method" in fields else "nothing"
        raise RecordError("invalid_method", f"method: expected 'POST', found {found}", "method")
    url = fields.get("url")
    endpoint = _URLS.get(url) if isinstance(url, str) else None
    if endpoint is None:
        found = shown(url) if "url" in fields else "nothing"
        raise RecordError("invalid_url", f"url: expected one of {', '.join(_URLS)}, found {found}", "url")
    body = fields.get("body")
    if not isinstance(body, dict):
        found = kind(body) if "body" in fields else "nothing"
        raise RecordError("invalid_body", f"body: expected a JSON object, found {found}", "body")
    return Parsed(row_id, endpoint, body, plain=False, extra=extra)


def _plain(row_id: str | None, fields: dict[str, Any], extra: dict[str, Any], names: ColumnNames) -> Parsed:
    """Takes out of `fields` what is no parameter."""
    prompt = None if names.prompt is None else fields.pop(names.prompt, None)
    for name in _ID_FIELDS if names.id is None else (names.id,):
        fields.pop(name, None)
    for name in extra:
        # A prompt that is kept is the prompt all the same; any other field that is kept is data.
        if names.prompt is not None or name not in CONTENT_FIELDS:
            fields.pop(name, None)
    body = fields if names.prompt is None else _with_prompt(names.prompt, prompt, fields)
    endpoint = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETIONS
    return Parsed(row_id, endpoint, body, extra=extra)


def _with_prompt(column: str, value: object, body: dict[str, Any]) -> dict[str, Any]:
    if value is None:
        raise RecordError("missing_required_parameter", f"{column}, the prompt column, is missing", column)
    beside = next((name for name in CONTENT_FIELDS if name in body), None)
    if beside is not None:
        raise RecordError(
            "unknown_parameter",
            f"{beside} stands beside {column}, the prompt column; leave it out or pass it through "
            f"(--keep-column {beside})",
            beside,
        )
    name, content = content_field(column, value)
    return {name: content, **body}
