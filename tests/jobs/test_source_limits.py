"""Inputs that are cut off, damaged or huge: what is read before, what is said, how much memory it takes."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from seesaw.jobs.base import JobOptions, Row, RowFailure
from seesaw.jobs.sources.open import open_rows
from tests.jobs.files import (
    FORMATS,
    jsonl,
    parquet,
    read,
    read_until_error,
)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".csv.gz", ".parquet"])
def test_files_cut_off_at_every_byte(suffix: str, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"{i * 7919 % 1000} ü"} for i in range(9)]
    path, content = tmp_path / f"in{suffix}", FORMATS[suffix](rows)
    path.write_bytes(content)
    whole = read(path)
    most = 0
    for size in range(len(content)):
        path.write_bytes(content[:size])
        found, error = read_until_error(path)
        assert error is not None and error.startswith(f"{path}: "), size
        assert found == whole[: len(found)]
        most = max(most, len(found))
    assert most == (0 if suffix == ".parquet" else len(whole))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"])
def test_damaged_bytes_never_raise_anything_else(suffix: str, tmp_path: Path) -> None:
    dice = random.Random(5)
    content = FORMATS[suffix]([{"id": f"r{i}", "prompt": f"{i * 7919 % 1000} ü"} for i in range(20)])
    path = tmp_path / f"in{suffix}"
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 1, 4])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        rows, error = read_until_error(path)
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        assert error is None or (error.startswith(f"{path}: ") and "\n" not in error)


def test_damage_is_told_with_its_place(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": "x" * 50} for i in range(1000)]
    path = tmp_path / "in.jsonl.gz"
    # A member of its own for each line: what stands before the cut is known.
    members = [gzip.compress(jsonl([row])) for row in rows]
    path.write_bytes(b"".join(members[:500]) + members[500][:-1])
    found, error = read_until_error(path)
    assert len(found) in (500, 501)
    incomplete = "the gzip data end too early; the file is incomplete"
    assert error == f"{path}: cannot be read after line {len(found)} ({incomplete})"
    path.write_bytes(b"".join(members[:500]) + b"garbage, not a member")
    found, error = read_until_error(path)
    assert len(found) == 500
    assert error == (
        f"{path}: cannot be read after line 500 (the gzip data are damaged: Not a gzipped file (b'ga'))"
    )
    table = tmp_path / "in.parquet"
    content = bytearray(parquet(rows, row_group_size=100, compression="none", use_dictionary=False))
    at = content.index(b"r700")
    content[at - 40 : at] = b"\xff" * 40  # the head of a page
    table.write_bytes(content)
    found, error = read_until_error(table)
    assert [row.id for row in found] == [row["id"] for row in rows[: len(found)]]
    assert len(found) >= 512
    assert error is not None
    assert error.startswith(f"{table}: cannot be read after row {len(found)} (the Parquet data are damaged: ")


def test_a_cell_that_is_too_long_fails_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seesaw.jobs.sources import delimited as module

    monkeypatch.setattr(module, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(module.csv, "field_size_limit", lambda *limit: 0)
    path = tmp_path / "in.csv.gz"
    path.write_bytes(gzip.compress(b"id,prompt\na," + b"x" * (40 << 20) + b"\nb,y\n"))
    tracemalloc.start()
    found = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(row) for row in found] == [RowFailure, Row]
    assert isinstance(found[0], RowFailure)
    assert found[0].message == "row 1 (line 2): the line has more than 1.00 MiB, the most that is read"
    assert peak < 12 << 20


def big(path: Path, rows: int) -> None:
    """Rows of 1 MiB each, in little space."""
    row = b'{"prompt": "' + b"x" * (1 << 20) + b'"}\n'
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(row, 1) * rows)
        return
    packer = zstandard.ZstdCompressor(1).compressobj()
    with path.open("wb") as file:
        for _ in range(rows):
            file.write(packer.compress(row))
        file.write(packer.flush())


@pytest.mark.parametrize(("name", "rows"), [("a.jsonl.gz", 150), ("a.jsonl.zst", 1024)])
def test_what_decompresses_to_a_gigabyte_is_read_in_constant_memory(
    name: str, rows: int, tmp_path: Path
) -> None:
    big(tmp_path / name, rows)
    assert (tmp_path / name).stat().st_size < 1 << 20
    tracemalloc.start()
    source = open_rows(JobOptions(input=tmp_path / name, model="m"))
    count = sum(1 for _ in source)
    source.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == rows
    assert peak < 32 << 20


def test_the_first_row_of_a_large_table_comes_at_once(tmp_path: Path) -> None:
    """Of one row group of 100 MB, only the pages of the first rows are read and decoded."""
    text = [f"{i}" + "x" * 1000 for i in range(100_000)]
    table = pa.table({"prompt": text})
    del text
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1 << 20, use_dictionary=False)
    del table
    before = pa.total_allocated_bytes()
    rows = open_rows(JobOptions(input=tmp_path / "in.parquet", model="m"))
    assert next(iter(rows)).id == "row-1"
    assert pa.total_allocated_bytes() - before < 8 << 20
    rows.close()
