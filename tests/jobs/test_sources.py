"""Inputs of every format: the same rows from each, one row of each record."""

from __future__ import annotations

import gzip
import io
import json
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.errors import JobError
from seesaw.jobs.base import Endpoint, JobOptions, Row, RowFailure
from seesaw.jobs.sources.open import check_formats, find_inputs, open_rows
from tests.jobs.files import (
    FORMATS,
    delimited,
    jsonl,
    parquet,
    read,
    zstd,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
ROW = st.fixed_dictionaries(
    {
        "id": st.none() | st.text("ab1é\n", min_size=1, max_size=2),
        "prompt": TEXT.filter(bool),
        "max_tokens": st.none() | st.integers(1, 9),
        "temperature": st.none() | st.floats(0, 2),
        "ignore_eos": st.none() | st.booleans(),
        "note": TEXT.filter(bool),
    }
)


def told(row: Row | RowFailure) -> tuple[Any, ...]:
    """What must not depend on the format."""
    if isinstance(row, RowFailure):
        return row.number, row.id.replace("line-", "row-"), row.code
    return (row.number, row.id.replace("line-", "row-"), row.endpoint, row.body, row.plain, row.extra)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_every_format_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("same")
    found = {}
    for suffix, make in FORMATS.items():
        path = folder / f"in{suffix}"
        path.write_bytes(make(rows))
        found[suffix] = [told(row) for row in read(path, keep_columns=("note",))]
    assert len(found[".jsonl"]) == len(rows)
    for suffix, there in found.items():
        assert there == found[".jsonl"], suffix


def test_conversations_and_token_ids_of_every_format(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 'Hi, "you"\n'}, {"role": "assistant", "content": "ü"}]
    for name, value, endpoint in (
        ("messages", messages, Endpoint.CHAT),
        ("prompt_token_ids", [5, 6, 7], Endpoint.COMPLETIONS),
    ):
        for suffix, make in FORMATS.items():
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(make([{name: value, "n": 2}]))
            (row,) = read(path)
            assert isinstance(row, Row)
            assert (row.endpoint, row.body) == (endpoint, {name: value, "n": 2})
    (tmp_path / "text.parquet").write_bytes(parquet([{"messages": json.dumps(messages)}]))
    (row,) = read(tmp_path / "text.parquet")
    assert isinstance(row, Row) and row.body == {"messages": messages}


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_without_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        header = b"" if "jsonl" in suffix else b"prompt\r\n"
        packed = gzip.compress(header) if suffix.endswith("gz") else zstd(header)
        path.write_bytes(packed if suffix.endswith(("gz", "zst")) else header)
    assert read(path) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.csv", b"", "is empty; expected a first line with the names of the columns"),
        ("in.csv", b"\xff\xfea\x00", "the names of the columns are not UTF-8; save the file as UTF-8"),
        (
            "in.csv",
            b'"prompt\n',
            "the line with the names of the columns cannot be read (unexpected end of data)",
        ),
        ("in.csv", b"prompt,id,id\n", "more than one column is named 'id'"),
        ("in.csv", b"id;prompt\n", "the columns are separated by ';'; a CSV file has ','"),
        ("in.tsv", b"id,prompt\n", "the columns are separated by ','; a TSV file has '\\t'"),
        (
            "in.csv",
            b"a,b\n",
            "none of its columns is named prompt, messages or prompt_token_ids; choose one with "
            "--prompt-column; the columns are 'a', 'b'",
        ),
        (
            "in.csv",
            b"prompt,messages\n",
            "prompt and messages may both hold the prompts; choose one with --prompt-column",
        ),
        (
            "in.parquet",
            b"",
            "cannot be read as Parquet (Parquet file size is 0 bytes)",
        ),
        (
            "in.parquet.gz",
            gzip.compress(b"PAR1"),
            "a Parquet file is read from a file of its own, not from a pipe or compressed",
        ),
        ("in.jsonl.gz", b"", "is named as a gzip file, but is empty"),
        (
            "in.jsonl.zst",
            b"\x00\x01\x02\x03\x04",
            "is named as a zstd file, but begins with 00 01 02 03",
        ),
        (
            "in.jsonl",
            b"PK\x03\x04rest",
            "is a zip archive; JSONL, CSV, TSV (also .gz and .zst) and Parquet are read",
        ),
        (
            "in.jsonl",
            b"\xfd7zXZ\x00",
            "is compressed with xz; JSONL, CSV, TSV (also .gz and .zst) and Parquet are read",
        ),
    ],
)
def test_unusable_files_are_found_before_the_job(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(JobError) as caught:
        check_formats(JobOptions(input=path, model="m"))
    assert str(caught.value) == f"{path}: {said}"
    with pytest.raises(JobError):
        open_rows(JobOptions(input=path, model="m"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"prompt_column": "q"}, "has no column 'q' (--prompt-column); the columns are 'prompt', 'b'"),
        ({"id_column": "q"}, "has no column 'q' (--id-column); the columns are 'prompt', 'b'"),
        ({"keep_columns": ("b", "q")}, "has no column 'q' (--keep-column); the columns are 'prompt', 'b'"),
    ],
)
def test_columns_that_are_missing(suffix: str, option: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    path.write_bytes(FORMATS[suffix]([{"prompt": "x", "b": "y"}]))
    with pytest.raises(JobError) as caught:
        check_formats(JobOptions(input=path, model="m", **option))
    assert str(caught.value) == f"{path}: {said}"


def test_columns_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"key": 7, "question": "Q", "prompt": "P", "max_tokens": 5, "model": "x", "n": 3, "tag": None}]
    for suffix in (".csv", ".parquet"):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(FORMATS[suffix](rows))
        (row,) = read(path, prompt_column="question", id_column="key")
        assert isinstance(row, Row)
        assert (row.id, row.body) == ("7", {"prompt": "Q", "max_tokens": 5, "n": 3})
        assert row.extra == {"prompt": "P", "model": "x", "tag": "" if suffix == ".csv" else None}
        # A column that is kept is data; the prompt and the id are what they are all the same.
        (row,) = read(path, prompt_column="question", id_column="key", keep_columns=("n", "question", "key"))
        assert isinstance(row, Row)
        assert row.body == {"prompt": "Q", "max_tokens": 5}
        kept = row.extra
        assert {name: str(value) for name, value in kept.items()} == {"n": "3", "question": "Q", "key": "7"}
    with caplog.at_level("INFO", "seesaw"):
        check_formats(JobOptions(input=path, model="m", prompt_column="question", id_column="key"))
    assert caplog.messages == [
        f"{path}: prompts from question; ids from key; parameters from max_tokens, n; passed through: prompt, "
        "model, tag; text is completed as it stands, without the chat template"
    ]


def test_the_log_says_that_text_is_no_chat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = "; text is completed as it stands, without the chat template, by few tokens (there is no column max_tokens)"
    for columns, said in (
        ("text", few),
        ("prompt", few),
        ("text,max_tokens", few.split(", by")[0]),
        ("messages", ""),
    ):
        path = tmp_path / "in.csv"
        path.write_text(f"{columns}\n")
        caplog.clear()
        with caplog.at_level("INFO", "seesaw"):
            check_formats(JobOptions(input=path, model="m", prompt_column=columns.split(",")[0]))
        (message,) = caplog.messages
        assert message.endswith(said) and ("template" in message) == bool(said)


def test_named_fields_of_plain_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines: list[dict[str, Any]] = [
        {"key": 1, "q": "text", "gold": {"a": [1]}, "max_tokens": 3},
        {"q": [{"role": "user", "content": "x"}]},
        {"q": [1, 2]},
        {"prompt": "p"},
        {"q": "x", "prompt": "p"},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}, "gold": 5},
    ]
    path.write_bytes(jsonl(lines))
    found = read(path, prompt_column="q", id_column="key", keep_columns=("gold",))
    assert [told(row)[1:4] for row in found if isinstance(row, Row)] == [
        ("1", Endpoint.COMPLETIONS, {"prompt": "text", "max_tokens": 3}),
        ("row-2", Endpoint.CHAT, {"messages": lines[1]["q"]}),
        ("row-3", Endpoint.COMPLETIONS, {"prompt_token_ids": [1, 2]}),
        ("b", Endpoint.COMPLETIONS, {"prompt": "p"}),
    ]
    assert [row.extra for row in found] == [{"gold": {"a": [1]}}, {}, {}, {}, {}, {"gold": 5}]
    assert [(row.code, row.message) for row in found if isinstance(row, RowFailure)] == [
        ("missing_required_parameter", "line 4: q, the prompt column, is missing"),
        (
            "unknown_parameter",
            "line 5: prompt stands beside q, the prompt column; leave it out or pass it through "
            "(--keep-column prompt)",
        ),
    ]
    path.write_bytes(b'{"prompt": "p", "max_tokens": 5, "x": 1}\n')
    (row,) = read(path, keep_columns=("prompt", "max_tokens", "x"))
    assert isinstance(row, Row)
    assert (row.body, row.extra) == ({"prompt": "p"}, {"prompt": "p", "max_tokens": 5, "x": 1})


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv_conventions(end: bytes, last: bool, bom: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    lines = [b"id,prompt,", b'a,"two', b'lines, ""quoted""",x', b"", b'b," z ",', b"c,,y"]
    path.write_bytes(bom + end.join(lines) + (end if last else b""))
    found = read(path)
    assert [(r.place, r.id) for r in found] == [("row 1", "a"), ("row 2", "b"), ("row 3", "c")]  # type: ignore[union-attr]
    bodies = [row.body["prompt"] for row in found if isinstance(row, Row)]
    assert bodies == [f'two{end.decode()}lines, "quoted"', " z ", ""]
    assert [row.extra for row in found] == [{"column_3": "x"}, {"column_3": ""}, {"column_3": "y"}]


def test_bad_rows_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'id,prompt\na,1\nb\nc,"x"y\nd,1,2\ne,\xff\nf,"two\nlines",3\ng,7\ng,8\n"h",9\nmessages,"[\n'
    )
    found = read(path)
    assert [row.id for row in found if isinstance(row, Row)] == ["a", "g", "h"]
    assert [(row.id, row.code, row.message) for row in found if isinstance(row, RowFailure)] == [
        ("row-2", "invalid_csv", "row 2 (line 3): expected 2 cells, found 1"),
        ("row-3", "invalid_csv", "row 3 (line 4): not valid CSV (',' expected after '\"')"),
        ("row-4", "invalid_csv", "row 4 (line 5): expected 2 cells, found 3"),
        ("row-5", "invalid_utf8", "row 5 (line 6): prompt: is not UTF-8"),
        ("row-6", "invalid_csv", "row 6 (lines 7 to 8): expected 2 cells, found 3"),
        (
            "g",
            "duplicate_custom_id",
            "row 8: the id 'g' was used in row 7 already; ids must be unique",
        ),
        ("row-10", "invalid_csv", "row 10 (line 12): not valid CSV (a quoted cell has no end)"),
    ]
    assert len({row.digest for row in found}) == 10
    path.write_bytes(b"id,messages\na,[1\n")
    (failure,) = read(path)
    assert isinstance(failure, RowFailure)
    assert (failure.id, failure.code) == ("a", "invalid_json")
    assert failure.message.startswith("row 1: messages='[1': not valid JSON (")


def test_what_a_file_is_its_bytes_say(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "x"}]
    for name, content in {
        "plain.jsonl.gz": jsonl(rows),
        "packed.jsonl": gzip.compress(jsonl(rows)),
        "other.jsonl.gz": zstd(jsonl(rows)),
        "packed.csv": gzip.compress(delimited(rows)),
        "packed": zstd(jsonl(rows)),
        "table.jsonl": parquet(rows),
        "table": parquet(rows),
        "UPPER.CSV": delimited(rows),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert [told(row)[1:4] for row in read(path)] == [("a", Endpoint.COMPLETIONS, {"prompt": "x"})], name


def test_many_members_and_frames(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": "x" * (i % 7)} for i in range(500)]
    pieces = [jsonl(rows)[i : i + 37] for i in range(0, len(jsonl(rows)), 37)]
    skipped = bytes.fromhex("502a4d18 03000000 616263")
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, pieces)) + b"\0" * 100)
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + b"".join(zstd(p) + skipped for p in [*pieces, b""]))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [row.id for row in read(tmp_path / name)] == [row["id"] for row in rows]


def test_a_huge_window_of_zstd_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False, strategy=1, hash_log=10)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(jsonl([{"prompt": "x"}])) + packer.flush())
    assert len(read(tmp_path / "a.jsonl.zst")) == 1


def test_an_input_that_fails_later_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "x"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "x"}\n')
    rows = open_rows(JobOptions(input=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), model="m"))
    reading = iter(rows)
    assert next(reading).id == "a.jsonl:line-1"
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(JobError) as caught:
        next(reading)
    assert str(caught.value) == f"{tmp_path / 'b.jsonl'}: cannot be read (No such file or directory)"
    rows.close()
    rows.close()


def test_several_inputs_of_several_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\n{"id": "x", "prompt": "1"}\n{"prompt": "2"}\n{"id": "y", "prompt": "3"}'
    )
    (tmp_path / "b.csv").write_bytes(b"id,prompt\ny,4\n,5\nz,6\n")
    (tmp_path / "c.parquet").write_bytes(
        parquet([{"id": "z", "prompt": "7"}, {"id": "w", "prompt": "8"}, {"id": "w", "prompt": "9"}])
    )
    found = read(*(tmp_path / name for name in ("a.jsonl", "b.csv", "c.parquet")))
    assert [row.number for row in found] == list(range(1, 10))
    assert [(row.place, row.id) for row in found if isinstance(row, Row)] == [
        ("a.jsonl: line 2", "x"),
        ("a.jsonl: line 3", "a.jsonl:line-3"),
        ("a.jsonl: line 4", "y"),
        ("b.csv: row 2", "b.csv:row-2"),
        ("b.csv: row 3", "z"),
        ("c.parquet: row 2", "w"),
    ]
    assert [(row.id, row.message) for row in found if isinstance(row, RowFailure)] == [
        ("y", "b.csv: row 1: the id 'y' was used on line 4 of a.jsonl already; ids must be unique"),
        ("z", "c.parquet: row 1: the id 'z' was used in row 3 of b.csv already; ids must be unique"),
        ("w", "c.parquet: row 3: the id 'w' was used in row 2 already; ids must be unique"),
    ]


def test_inputs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "in.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b'{"prompt": "x"}\n')
    assert [row.id for row in read(*paths)] == [f"{path}:line-1" for path in paths]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("part-2.jsonl", "part-10.jsonl", "part-1.csv", "odd[1].jsonl", "deep/er/part-3.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("part-x.jsonl").mkdir()
    assert find_inputs(["part-*.jsonl"]) == (Path("part-10.jsonl"), Path("part-2.jsonl"))
    assert find_inputs(["none.jsonl", "-"]) == (Path("none.jsonl"), Path("-"))
    assert find_inputs(["odd[1].jsonl"]) == (Path("odd[1].jsonl"),)
    assert find_inputs(["**/part-[13].*"]) == (Path("deep/er/part-3.jsonl"), Path("part-1.csv"))
    for patterns, said in (
        (["no-*.jsonl"], "no-*.jsonl: matches no file"),
        (["part-2.jsonl", "part-*.jsonl"], "part-2.jsonl: is named twice among the inputs"),
        (["-", "-"], "standard input: is named twice among the inputs"),
    ):
        with pytest.raises(JobError) as caught:
            find_inputs(patterns)
        assert str(caught.value) == said


def test_default_names(tmp_path: Path) -> None:
    for given_name, name in (("a.jsonl.gz", "a"), ("b.csv", "b"), ("c.d.parquet", "c.d"), ("e", "e")):
        options = JobOptions(input=(tmp_path / given_name, tmp_path / "z"), model="m")
        assert options.output_path == tmp_path / f"{name}.output.jsonl"
        assert options.errors_path == tmp_path / f"{name}.output.errors.jsonl"
    options = JobOptions(input=tmp_path / "a", output=tmp_path / "o.csv.zst", model="m")
    assert options.errors_path == tmp_path / "o.errors.jsonl"
    with pytest.raises(JobError) as caught:
        _ = JobOptions(input=Path("-"), model="m").output_path
    assert str(caught.value) == "the input is standard input; name the output with --output"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_standard_input(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(b'{"id": "a", "prompt": "x"}\n{"prompt": "y"}\n')

    class Trickle(io.RawIOBase):
        """A pipe that gives a byte at a time."""

        at = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            piece = data[self.at : self.at + 1]
            buffer[: len(piece)] = piece
            self.at += len(piece)
            return len(piece)

    standard = io.TextIOWrapper(io.BufferedReader(Trickle()))
    monkeypatch.setattr(sys, "stdin", standard)
    options = JobOptions(input=Path("-"), model="m", output=Path("/tmp/o.jsonl"))
    check_formats(options)
    rows = open_rows(options)
    assert [row.id for row in rows] == ["a", "line-2"]
    assert (rows.total, rows.left(2)) == (None, None)
    rows.close()
    assert not standard.closed


def test_a_parquet_file_cannot_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(parquet([{"prompt": "x"}]))))
    with pytest.raises(JobError) as caught:
        read(Path("-"))
    assert str(caught.value) == (
        "standard input: a Parquet file is read from a file of its own, not from a pipe or compressed"
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_left_is_estimated(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        path.write_bytes(
            FORMATS[suffix]([{"id": f"{path.name}{i:04d}", "prompt": "abc"} for i in range(500)])
        )
    for inputs, total in ((paths[:1], 500), (paths, 1000)):
        rows = open_rows(JobOptions(input=tuple(inputs), model="m"))
        assert rows.left(0) is None
        reading, read_rows = iter(rows), 0
        for at in (50, 300, *((650,) if total > 500 else ())):
            read_rows += len(list(islice(reading, at - read_rows)))
            left = rows.left(read_rows)
            assert left is not None and abs(left - (total - at)) <= 0.06 * total, at
        read_rows += len(list(reading))
        assert rows.left(read_rows) == 0
        counted = suffix in (".jsonl", ".parquet")
        deadline = time.monotonic() + 10
        while counted and rows.total is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rows.total == (total if counted else None)
        rows.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("seesaw-")]
