"""Cells of tables: what becomes of each type, and of text that stands for another."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seesaw.core.errors import JobError
from seesaw.jobs.base import Row, RowFailure
from tests.jobs.files import (
    delimited,
    read,
)


def test_cells_of_parameters(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    table = [
        {"prompt": "a", "temperature": " 0.5", "ignore_eos": "True", "stop": "1", "stop_token_ids": "[2, 3]"},
        {"prompt": "b", "temperature": "hot", "ignore_eos": "", "stop": '["x", "y"]', "stop_token_ids": ""},
        {"prompt": "c", "temperature": "1e0", "ignore_eos": "FALSE", "stop": "[", "stop_token_ids": "[2"},
    ]
    path.write_bytes(delimited(table))
    bodies = [row.body for row in read(path) if isinstance(row, Row)]
    assert bodies == [
        {"prompt": "a", "temperature": 0.5, "ignore_eos": True, "stop": "1", "stop_token_ids": [2, 3]},
        {"prompt": "b", "temperature": "hot", "stop": ["x", "y"]},
        {"prompt": "c", "temperature": 1.0, "ignore_eos": False, "stop": "[", "stop_token_ids": "[2"},
    ]


def test_columns_of_many_types(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    table = {
        "custom_id": pa.array([1.0, None]),
        "prompt": pa.array(["a", None]).dictionary_encode(),
        "max_tokens": pa.array([3.0, float("nan")]),
        "temperature": pa.array([decimal.Decimal("0.25"), None]),
        "nanoseconds": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "day": pa.array([when.date(), None]),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "bytes": pa.array([b"\xff", None]),
        "nested": pa.array([[{"a.b": [1.5, None]}], None]),
        "a.b": pa.array([2**63, None], pa.uint64()),
        "": pa.array([True, False]),
        "seed": pa.array([b"7", None], pa.binary()),
    }
    pq.write_table(pa.table(table), path)
    first, second = read(path)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert first.id == "1" and first.body == {
        "prompt": "a",
        "max_tokens": 3.0,
        "temperature": 0.25,
        "seed": 7,
    }
    assert first.extra == {
        "nanoseconds": "2026-01-02T03:04:05.678901Z",
        "day": "2026-01-02",
        "price": "1.50",
        "bytes": "/w==",
        "nested": [{"a.b": [1.5, None]}],
        "a.b": 2**63,
        "": True,
    }
    assert second.id == "row-2" and second.body == {"prompt": None}
    json.dumps([first.extra, second.extra], allow_nan=False)


def test_text_may_be_stored_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": [b"a", b"b"], "prompt": ["ü".encode(), b"\xff"]}), path)
    first, second = read(path)
    assert isinstance(first, Row) and (first.id, first.body) == ("a", {"prompt": "ü"})
    assert isinstance(second, RowFailure) and second.code == "invalid_utf8"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["prompt", "prompt"]), path)
    with pytest.raises(JobError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: more than one column is named 'prompt'"


def test_a_text_that_is_not_utf8_fails_its_row_of_a_parquet_file_only(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    pq.write_table(pa.table({"prompt": prompts}), path)
    found = read(path)
    assert [row.body["prompt"] for row in found if isinstance(row, Row)] == ["a", "b"]
    assert isinstance(found[1], RowFailure)
    assert (found[1].id, found[1].code) == ("row-2", "invalid_utf8")
    assert found[1].message == "row 2: a text of the row is not UTF-8 (invalid start byte)"
