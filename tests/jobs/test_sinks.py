"""Outputs of every format: what is written is what is read again, in bounded memory, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions, Row
from seesaw.jobs.finish import finish
from seesaw.jobs.runner import run_job
from seesaw.jobs.sinks import table
from seesaw.jobs.sinks.flat import flatten
from seesaw.jobs.sinks.open import check_format, is_plain, open_sink
from seesaw.jobs.sources.open import check_formats
from tests.jobs.echo_engine import EchoEngine
from tests.jobs.files import FORMATS, read

PACKED = [".jsonl", ".jsonl.gz", ".jsonl.zst"]
TABLES = [".csv", ".tsv", ".csv.gz", ".tsv.zst", ".parquet"]


def answer(row_id: str, *texts: str, extra: dict[str, Any] | None = None) -> bytes:
    """A line of an output file."""
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    body = {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": len(texts)}}
    line = {"id": "x", "custom_id": row_id, "response": {"status_code": 200, "body": body}, "error": None}
    return json.dumps({**line, **({} if extra is None else {"extra": extra})}).encode() + b"\n"


def write(path: Path, lines: list[bytes]) -> None:
    with open_sink(path) as sink:
        for line in lines:
            sink.write(line)


def table_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that was written; of CSV and TSV, all cells are text."""
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    text = io.StringIO(data.decode(), newline="")
    return list(csv.DictReader(text, delimiter="\t" if ".tsv" in path.name else ",", strict=True))


def test_rows_of_answers_and_failures() -> None:
    chat = {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "length"}]}
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    line = {"custom_id": "c", "response": {"body": {**chat, "usage": usage}}, "error": None}
    told = {"text": "hi", "finish_reason": "length", "prompt_tokens": 5, "completion_tokens": 6}
    assert flatten(json.dumps(line).encode()) == {"id": "c", **told}
    several = flatten(answer("s", "one", "two"))
    assert (several["text"], several["texts"], several["completion_tokens"]) == ("one", ["one", "two"], 2)
    refused = {
        "custom_id": "r",
        "response": {"status_code": 400, "body": {"error": {"code": "c", "message": "m"}}},
    }
    malformed = {"custom_id": "r", "response": None, "error": {"code": "c", "message": "m"}}
    for line in (refused, malformed):
        assert flatten(json.dumps(line).encode()) == {"id": "r", "code": "c", "message": "m"}
    clash = {"text": 1, "input_text": 2, "id": 3, "other": 4}
    assert list(flatten(answer("a", "t", extra=clash)).items())[:5] == [
        *(("id", "a"), ("input_input_text", 1), ("input_text", 2), ("input_id", 3), ("other", 4)),
    ]


def test_formats_by_name(tmp_path: Path) -> None:
    plain = ["a.jsonl", "a.json", "a", "a.JSONL", "a.b.c"]
    other = ["a.jsonl.gz", "a.zst", "a.csv", "a.CSV", "a.tsv.gz", "a.parquet"]
    assert [is_plain(Path(name)) for name in plain + other] == [True] * len(plain) + [False] * len(other)
    for name in ("a.xlsx", "a.zip", "a.parquet.gz"):
        with pytest.raises(JobError) as caught:
            check_format(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name}: cannot be written in the format of that name; choose .jsonl, .csv, .tsv (also .gz "
            "and .zst) or .parquet"
        )
    (tmp_path / "in.jsonl").write_bytes(b"")
    for option in ("output", "errors"):
        files = {option: tmp_path / "a.xlsx"}
        with pytest.raises(JobError, match=r"a\.xlsx: cannot be written"):
            check_formats(JobOptions(input=tmp_path / "in.jsonl", model="m", **files))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", PACKED)
def test_lines_stay_as_they_are(suffix: str, tmp_path: Path) -> None:
    lines = [answer(f"r{i}", "text ü " * i) for i in range(200)]
    for name in ("a", "b"):
        write(tmp_path / f"{name}{suffix}", lines)
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data == (tmp_path / f"b{suffix}").read_bytes()
    unpacked = {
        ".jsonl": lambda: data,
        ".jsonl.gz": lambda: gzip.decompress(data),
        ".jsonl.zst": lambda: zstandard.ZstdDecompressor().stream_reader(data).read(),
    }[suffix]()
    assert unpacked == b"".join(lines)


@pytest.mark.parametrize("suffix", [*PACKED, *TABLES])
def test_a_file_without_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, [])
    assert read(path, **({"prompt_column": "text"} if suffix in TABLES else {})) == []
    if suffix == ".parquet":
        assert pq.read_schema(path).names == [
            "id",
            "text",
            "finish_reason",
            "prompt_tokens",
            "completion_tokens",
        ]


@pytest.mark.parametrize("suffix", TABLES)
def test_what_is_written_can_be_an_input(suffix: str, tmp_path: Path) -> None:
    texts = ["one", 'two\n"lines"', "a\rb", "ü,;\t", "0"]
    write(
        tmp_path / f"a{suffix}", [answer(f"r{i}", text, extra={"tag": text}) for i, text in enumerate(texts)]
    )
    found = read(tmp_path / f"a{suffix}", prompt_column="text", keep_columns=("tag",))
    rows = [row for row in found if isinstance(row, Row)]
    assert [(row.id, row.body["prompt"], row.extra["tag"]) for row in rows] == [
        (f"r{i}", text, text) for i, text in enumerate(texts)
    ]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b.c", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
ALIKE = st.sampled_from(
    [
        st.none(),
        st.none() | st.integers(-5, 5),
        st.integers(-5, 5) | st.floats(-1, 1),
        st.integers(2**53, 2**62) | st.floats(-1, 1),
        st.lists(st.none() | st.integers(0, 3), max_size=2),
        st.fixed_dictionaries({}, optional={"a": st.integers(0, 3), "b": st.text("xy", max_size=2)}),
        st.booleans(),
        JSON,
    ]
)


@st.composite
def lines_of_columns(draw: st.DrawFn) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Ids, texts and extras. Each column has a kind of value of its own, and may begin or end anywhere."""
    names = ["x", "y z", "text", "é.a"]
    kinds = {name: draw(ALIKE) for name in names}
    rows = []
    for i in range(draw(st.integers(0, 8))):
        present = draw(st.lists(st.sampled_from(names), unique=True))
        extra = {name: draw(kinds[name]) for name in present}
        rows.append(
            (f"r{i}", draw(st.lists(st.text("ab\n\r,\"'ü", max_size=3), min_size=1, max_size=2)), extra)
        )
    return rows


def column(name: str) -> str:
    return "input_text" if name == "text" else name


def same(value: Any, there: Any) -> bool:
    """Whether a cell of a Parquet file holds `value`, perhaps as JSON, or with the nulls of objects alike."""
    if isinstance(there, str) and not isinstance(value, str):
        return same(value, json.loads(there))
    if isinstance(value, dict):
        return value.keys() <= there.keys() and all(same(value.get(k), cell) for k, cell in there.items())
    if isinstance(value, list):
        return isinstance(there, list) and len(value) == len(there) and all(map(same, value, there))
    return isinstance(value, bool) == isinstance(there, bool) and bool(value == there)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that what later rows need comes when something has been written."""
    monkeypatch.setattr(table, "GROUP_ROWS", 2)
    yield


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=lines_of_columns())
def test_tables_hold_what_the_lines_held(
    rows: list[tuple[str, list[str], dict[str, Any]]],
    small_groups: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    lines = [answer(row_id, *texts, extra=extra) for row_id, texts, extra in rows]
    for suffix in (".parquet", ".csv", ".tsv.zst"):
        path = folder / f"a{suffix}"
        write(path, lines)
        there = table_of(path)
        assert [row["id"] for row in there] == [row_id for row_id, _, _ in rows]
        for (_, texts, extra), found in zip(rows, there, strict=True):
            parquet = suffix == ".parquet"
            assert found["text"] == texts[0]
            several = texts if len(texts) > 1 else None
            if "texts" in found:
                cell = found["texts"] or None
                assert (cell if parquet or cell is None else json.loads(cell)) == several
            else:
                assert several is None
            for name, value in extra.items():
                cell = found[column(name)]
                if parquet:
                    assert same(value, cell), (name, value, cell)
                elif value is None or isinstance(value, str):
                    assert cell == (value or "")
                else:
                    assert json.loads(cell) == value
        assert sorted(p.name for p in folder.iterdir() if ".rewrite" in p.name) == []


def test_a_column_of_several_types_is_text_and_is_told_once(
    small_groups: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: list[Any] = [1, 2, 3, "x", {"a": 1}, None, 1.5, "y"]
    write(
        tmp_path / "a.parquet", [answer(f"r{i}", "t", extra={"x": value}) for i, value in enumerate(values)]
    )
    assert pq.read_table(tmp_path / "a.parquet")["x"].to_pylist() == [
        *("1", "2", "3", "x", '{"a":1}', None, "1.5", "y"),
    ]
    assert caplog.messages == [
        f"{tmp_path / 'a.parquet'}: no type holds all values of column x; it is written as text"
    ]


def test_types_of_columns(small_groups: None, tmp_path: Path) -> None:
    rows = [
        {"f": 1, "n": None, "l": []},
        {"f": 2, "n": None, "l": []},
        {"f": 2.5, "l": [1]},
        {"s": {"k": True}},
    ]
    write(tmp_path / "a.parquet", [answer(f"r{i}", "t", extra=row) for i, row in enumerate(rows)])
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert {name: str(schema.field(name).type) for name in ("f", "n", "l", "s")} == {
        "f": "double",
        "n": "string",
        "l": "list<element: int64>",
        "s": "struct<k: bool>",
    }


def test_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "GROUP_BYTES", 1 << 20)
    line = answer("r", "x" * 4000, extra={"n": 1})
    for suffix in (".parquet", ".csv"):
        tracemalloc.start()
        write(tmp_path / f"a{suffix}", [line] * 4_000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups
    assert 14 < groups < 18


@pytest.mark.parametrize("suffix", [*PACKED[1:], *TABLES])
def test_a_job_may_be_written_as(suffix: str, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "n": 2 if i == 5 else 1, "tag": str(i)} for i in range(20)]
    rows.append({"id": "bad", "prompt": "", "n": 1, "tag": "99"})
    source = tmp_path / "in.parquet"
    source.write_bytes(FORMATS[".parquet"](rows))
    files = {"output": tmp_path / f"out{suffix}", "errors": tmp_path / f"err{suffix}"}
    summary = run_job(EchoEngine(), JobOptions(input=source, model="m", **files))  # type: ignore[arg-type]
    assert (summary.rows_answered, summary.rows_failed) == (20, 1)
    assert not list(tmp_path.glob("*.finishing")) and not list(tmp_path.glob(f"err{suffix}.part"))
    if suffix in TABLES:
        there = {row["id"]: row for row in table_of(files["output"])}
        assert {name: (row["text"], row["tag"]) for name, row in there.items()} == {
            f"r{i}": (f"p{i}"[::-1], str(i)) for i in range(20)
        }
        (failure,) = table_of(files["errors"])
        assert (failure["id"], failure["tag"], failure["code"]) == ("bad", "99", "empty_prompt")
        assert failure["message"] == "row 21: the prompt is empty"


def test_lines_have_what_passes_through_and_are_openais_otherwise(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"id": "a", "prompt": "x", "tag": {"k": 1}}\n{"id": "b", "prompt": "y"}\n{"tag": 5}\n'
    )
    run_job(EchoEngine(), JobOptions(input=source, output=output, model="m", keep_columns=("tag",)))
    lines = {line["custom_id"]: line for line in map(json.loads, output.read_bytes().splitlines())}
    assert list(lines["a"]) == ["id", "custom_id", "response", "error", "extra"]
    assert lines["a"]["extra"] == {"tag": {"k": 1}}
    assert list(lines["b"]) == ["id", "custom_id", "response", "error"]
    (failure,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_bytes().splitlines())
    assert (failure["custom_id"], failure["extra"]) == ("line-3", {"tag": 5})


@pytest.mark.parametrize("suffix", [*PACKED, *TABLES])
def test_a_full_disk_is_an_os_error(suffix: str, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    sink = open_sink(Path("/dev/full"), name=tmp_path / f"a{suffix}")
    with pytest.raises(OSError, match="No space left"):
        for i in range(3):
            sink.write(answer(f"r{i}", os.urandom(2 << 20).hex()))
        sink.close()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz", ".parquet"])
def test_what_cannot_be_written_whole_leaves_what_was_there(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"out{suffix}"
    target.write_bytes(b"of an earlier job")
    target.with_name(target.name + ".finishing").mkdir()
    with pytest.raises(JobError, match="cannot be written"):
        finish(iter([answer("a", "x")]), target)
    assert target.read_bytes() == b"of an earlier job"
    target.with_name(target.name + ".finishing").rmdir()
    finish(iter([answer("a", "x")]), target)
    assert sorted(p.name for p in tmp_path.iterdir()) == [target.name]


@pytest.mark.parametrize(
    "cells",
    [[0.0, False], [True, 1], [[0.5, True]], [[1], [False]], [{"a": 0.0}, {"a": False}]],
)
def test_truth_is_no_number(cells: list[Any], tmp_path: Path) -> None:
    """pyarrow takes False among numbers for 0."""
    path = tmp_path / "a.parquet"
    write(path, [answer(f"r{i}", "a", extra={"c": cell}) for i, cell in enumerate(cells)])
    assert all(same(cell, row["c"]) for cell, row in zip(cells, table_of(path), strict=True))
