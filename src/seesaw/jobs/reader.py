"""Rows of a JSONL job file: OpenAI Batch lines and plain lines, read one at a time.

Whatever bytes a line holds, it becomes one `Row` or one `RowFailure`; only blank lines vanish.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO
from zlib import crc32

import msgspec

from seesaw.core.units import format_bytes
from seesaw.jobs.base import Endpoint, Row, RowFailure
from seesaw.jobs.id_index import IdIndex
from seesaw.jobs.lines import MAX_LINE_BYTES, read_lines

_ENVELOPE = ("method", "url", "body")
_BATCH_FIELDS = {"custom_id", *_ENVELOPE}
_URLS = {endpoint.value: endpoint for endpoint in Endpoint}
_SHOWN = 40


class _LineError(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def read_rows(
    file: BinaryIO, *, max_line_bytes: int = MAX_LINE_BYTES, prefix: str = ""
) -> Iterator[Row | RowFailure]:
    """The rows of a job file, in order, in memory that grows only by the digests of their ids.

    A line with `method`, `url` or `body` is in OpenAI's Batch format; any other object is a plain row, whose
    fields are those of the body, with `id` or `custom_id` beside them. Ids must be unique in the file; the
    second row of an id fails. Places begin with `prefix`.
    """
    seen = IdIndex()
    for number, (line_number, line) in enumerate(read_lines(file, max_bytes=max_line_bytes), start=1):
        row_id, place = f"line-{line_number}", f"{prefix}line {line_number}"
        digest = 0 if line is None else crc32(line)
        try:
            fields = _decode(line, line_number, max_line_bytes)
            batch = any(name in fields for name in _ENVELOPE)
            row_id = _own_id(fields, batch) or row_id
            earlier = seen.add(row_id, line_number)
            if earlier is not None:
                raise _LineError(
                    "duplicate_custom_id",
                    f"the id {_shown(row_id)} was used on line {earlier} already; ids must be unique",
                    "custom_id",
                )
            endpoint, body = _batch_row(fields) if batch else _plain_row(fields)
            yield Row(
                number=number,
                place=place,
                digest=digest,
                id=row_id,
                endpoint=endpoint,
                body=body,
                plain=not batch,
            )
        except _LineError as error:
            yield RowFailure(
                number=number,
                digest=digest,
                id=row_id,
                code=error.code,
                message=f"{place}: {error}",
                param=error.param,
            )


def _decode(line: bytes | None, number: int, max_bytes: int) -> dict[str, Any]:
    if line is None:
        raise _LineError(
            "line_too_long", f"the line has more than {format_bytes(max_bytes)}, the most that is read"
        )
    try:
        value = msgspec.json.decode(line)
    except RecursionError as error:
        raise _LineError("invalid_json", "the JSON is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(line, number, error) from error
    if not isinstance(value, dict):
        raise _LineError("invalid_json", f"expected a JSON object, found {_kind(value)}")
    return value


def _malformed(line: bytes, number: int, reason: Exception) -> _LineError:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; the file looks like UTF-16, save it as UTF-8" if utf16 else ""
        return _LineError("invalid_utf8", f"byte {error.start + 1} of the line is not UTF-8{hint}")
    return _LineError("invalid_json", f"not valid JSON ({str(reason).removeprefix('JSON is malformed: ')})")


def _own_id(fields: dict[str, Any], batch: bool) -> str | None:
    """The id a row carries; None for a plain row without one."""
    if batch:
        if "custom_id" not in fields:
            raise _LineError(
                "missing_custom_id", "custom_id is missing; a Batch line must have one", "custom_id"
            )
        return _text_id("custom_id", fields["custom_id"])
    given = [(name, fields[name]) for name in ("custom_id", "id") if fields.get(name) is not None]
    if not given:
        return None
    ids = [_text_id(name, str(v) if type(v) is int else v) for name, v in given]
    if len(set(ids)) > 1:
        raise _LineError(
            "invalid_custom_id", f"custom_id {_shown(ids[0])} and id {_shown(ids[1])} differ; give one"
        )
    return ids[0]


def _text_id(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        found = "an empty string" if value == "" else _kind(value)
        raise _LineError(
            "invalid_custom_id", f"{name}: expected a string that is not empty, found {found}", name
        )
    return value


def _batch_row(fields: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    unknown = next((name for name in fields if name not in _BATCH_FIELDS), None)
    if unknown is not None:
        raise _LineError(
            "unknown_parameter",
            f"unknown field {_shown(unknown)} of a Batch line; parameters go into its body",
            unknown,
        )
    if fields.get("method") != "POST":
        found = _shown(fields["method"]) if "method" in fields else "nothing"
        raise _LineError("invalid_method", f"method: expected 'POST', found {found}", "method")
    url = fields.get("url")
    endpoint = _URLS.get(url) if isinstance(url, str) else None
    if endpoint is None:
        found = _shown(url) if "url" in fields else "nothing"
        raise _LineError("invalid_url", f"url: expected one of {', '.join(_URLS)}, found {found}", "url")
    body = fields.get("body")
    if not isinstance(body, dict):
        found = _kind(body) if "body" in fields else "nothing"
        raise _LineError("invalid_body", f"body: expected a JSON object, found {found}", "body")
    return endpoint, body


def _plain_row(fields: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    body = {name: value for name, value in fields.items() if name not in ("id", "custom_id")}
    endpoint = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETIONS
    return endpoint, body


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: object) -> str:
    """`value` as it goes into a message: never long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
