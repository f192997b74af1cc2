"""Poison rows: each becomes exactly one error line, and nothing else is touched by it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from seesaw.jobs.base import JobOptions, JobSummary
from seesaw.jobs.runner import run_job
from seesaw.jobs.sources.jsonl import json_records
from tests.jobs.contract import check_answer, check_failure, message, read
from tests.jobs.echo_engine import WINDOW, EchoEngine
from tests.jobs.poison import POISONS, Poison


def run(path: Path, content: bytes, engine: EchoEngine | None = None) -> JobSummary:
    source = path / "in.jsonl"
    source.write_bytes(content)
    options = JobOptions(input=source, output=path / "out.jsonl", model="m", served_model_name="m")
    return run_job(engine or EchoEngine(), options)


def check_row(line: dict[str, object], poison: Poison, row_id: str, number: int) -> None:
    check_failure(line, code=poison.code, status=poison.status, param=poison.param)
    assert line["custom_id"] == (row_id if poison.has_id else f"line-{number}")
    assert f"line {number}:" in message(line)
    assert len(message(line)) < 400


@pytest.mark.parametrize("poison", POISONS, ids=lambda p: p.name)
def test_each_poison_is_one_error_line(poison: Poison, tmp_path: Path) -> None:
    good = b'{"id": "good", "prompt": "abc"}\n'
    summary = run(tmp_path, good + poison.line.replace(b"@ID@", b"bad") + b"\n")
    answers, failures = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert [a["custom_id"] for a in answers] == ["good"]
    assert len(failures) == 1
    check_row(failures[0], poison, "bad", 2)
    assert summary.exit_code == 1
    assert summary.failures == {poison.code: 1}


def test_a_thousand_rows_with_a_hundredth_of_each_poison(tmp_path: Path) -> None:
    dice = random.Random(0)
    good = 1000 - 10 * len(POISONS)
    rows: list[tuple[str, Poison | None]] = [(f"row-{i}", None) for i in range(good)]
    rows += [(f"bad-{i}-{j}", poison) for i, poison in enumerate(POISONS) for j in range(10)]
    dice.shuffle(rows)
    assert len(rows) == 1000 and good > 100
    lines = [
        b'{"id": "%s", "prompt": "%s"}' % (row_id.encode(), row_id.encode())
        if poison is None
        else poison.line.replace(b"@ID@", row_id.encode())
        for row_id, poison in rows
    ]
    engine = EchoEngine()
    summary = run(tmp_path, b"\n".join(lines), engine)

    answers, failures = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    expected = {
        row_id if poison is None or poison.has_id else f"line-{i}"
        for i, (row_id, poison) in enumerate(rows, 1)
    }
    written = Counter(line["custom_id"] for line in answers + failures)
    assert set(written) == expected
    assert set(written.values()) == {1}
    assert len(answers) == summary.rows_answered == good
    assert len(failures) == summary.rows_failed == 10 * len(POISONS)
    for line in answers:
        check_answer(line, "text_completion")
        assert line["response"]["body"]["choices"][0]["text"] == line["custom_id"][::-1]
    by_id = {line["custom_id"]: line for line in failures}
    for number, (row_id, poison) in enumerate(rows, 1):
        if poison is not None:
            check_row(by_id[row_id if poison.has_id else f"line-{number}"], poison, row_id, number)
    assert summary.exit_code == 1
    assert engine.held <= WINDOW


def test_the_second_row_of_an_id_fails_and_names_both_lines(tmp_path: Path) -> None:
    summary = run(
        tmp_path,
        b'{"id": "a", "prompt": "one"}\n\n{"id": "b", "prompt": "x"}\n{"custom_id": "a", "prompt": "two"}',
    )
    answers, failures = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert {a["custom_id"]: a["response"]["body"]["choices"][0]["text"] for a in answers} == {
        "a": "eno",
        "b": "x",
    }
    assert [f["custom_id"] for f in failures] == ["a"]
    check_failure(failures[0], code="duplicate_custom_id", status=None, param=None)
    assert "line 4" in message(failures[0])
    assert "line 1" in message(failures[0])
    assert summary.exit_code == 1


def test_an_invented_id_may_be_taken(tmp_path: Path) -> None:
    run(tmp_path, b'{"id": "line-2", "prompt": "a"}\n{"prompt": "b"}\n')
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert [f["error"]["code"] for f in read(tmp_path / "out.errors.jsonl")] == ["duplicate_custom_id"]


def test_without_a_tokeniser_text_fails_and_tokens_are_served(tmp_path: Path) -> None:
    engine = EchoEngine()
    engine.tokenizer = None  # type: ignore[assignment]
    run(
        tmp_path,
        b'{"prompt": "a"}\n{"prompt_token_ids": [97, 98]}\n{"messages": [{"role": "user", "content": "a"}]}',
        engine,
    )
    assert [a["custom_id"] for a in read(tmp_path / "out.jsonl")] == ["line-2"]
    codes = [f["response"]["body"]["error"]["code"] for f in read(tmp_path / "out.errors.jsonl")]
    assert codes == ["no_tokenizer"] * 2


def test_blank_and_huge_lines_and_two_of_one_id_among_a_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison of the file rather than of a row: a hundredth of each."""
    monkeypatch.setitem(json_records.__kwdefaults__, "max_line_bytes", 4096)
    lines, expected = [], Counter[str]()
    for i in range(1000):
        kind = {3: "blank", 41: "huge", 77: "again"}.get(i % 100, "good")
        row_id = f"row-{i - 1 if kind == 'again' else i}"
        line = b'{"id": "%s", "prompt": "%s"}' % (row_id.encode(), b"x" * (9000 if kind == "huge" else 3))
        lines.append(b" \t" if kind == "blank" else line)
        if kind != "blank":
            expected[f"line-{i + 1}" if kind == "huge" else row_id] += 1
    summary = run(tmp_path, b"\r\n".join(lines))
    written = read(tmp_path / "out.jsonl") + read(tmp_path / "out.errors.jsonl")
    assert Counter(line["custom_id"] for line in written) == expected
    assert summary.failures == {"line_too_long": 10, "duplicate_custom_id": 10}
    assert (summary.rows_answered, summary.exit_code) == (970, 1)
