"""The cookbook's scripts, run as they stand on the example's model: what they print and write is right."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seesaw import LLM, CompletionOutput, RequestOutput
from seesaw.core.request import TokenLogprob

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "cookbook" / "data"


def script(name: str) -> ModuleType:
    """A script of the cookbook as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "cookbook" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def labelled() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "orders.jsonl").read_text().splitlines()]


def numbers(pattern: str, text: str) -> list[int]:
    """The groups of a pattern that must stand in the text."""
    found = re.search(pattern, text)
    assert found is not None, text
    return [int(number) for number in found.groups()]


# ---- the scripts as they are ------------------------------------------------------------------------------


def test_summaries_of_a_parquet_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "out.parquet"
    script("summarise_parquet").main(["--output", str(target)])
    before, after = pq.read_table(DATA / "orders.parquet"), pq.read_table(target)
    assert after.column_names == [*before.column_names, "summary"]
    assert after.select(before.column_names).equals(before)
    rows = zip(after["summary"].to_pylist(), labelled(), strict=True)
    right = sum(json.loads(summary) == row["fields"] for summary, row in rows)
    assert right >= 294
    assert "300 rows, 0 without a summary" in capsys.readouterr().out


def test_an_evaluation_tells_prompts_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "part.jsonl"
    data.write_text("".join((DATA / "orders.jsonl").read_text().splitlines(keepends=True)[:120]))
    script("evaluate").main(["--data", str(data), "--plan", "T1", "--ranks", "1"])
    out = capsys.readouterr().out
    (bare,) = numbers(r"bare: (\d+) of 120 exactly right", out)
    (instructed,) = numbers(r"instructed: (\d+) of 120 exactly right", out)
    assert bare >= 116
    assert 80 <= instructed <= 108
    assert len(re.findall(r" x [\w.]+: .+ read as ", out)) >= 5


def test_synthetic_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "orders.jsonl"
    script("synthesise").main(["--output", str(target)])
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [len(rows), 160] == numbers(r"(\d+) orders of (\d+) samples", out)
    broken, double = numbers(r"(\d+) broken or not as asked, (\d+) there before", out)
    assert broken + double + len(rows) == 160
    assert len(rows) >= 80
    assert len({json.dumps(row["order"], sort_keys=True) for row in rows}) == len(rows)
    assert {row["sample"] for row in rows} == set(range(8))
    for row in rows:
        (item,) = row["order"]["items"]
        assert (
            row["prompt"]
            == f"We need {item['quantity']} {item['product']} in {row['order']['city']}. Contact:"
        )
    # Each sample is prefilled by itself. Whoever changes that changes what the script says of it.
    assert "computed 8.0 times: n=8" in out


def test_scores_of_labels(capsys: pytest.CaptureFixture[str]) -> None:
    script("score_logprobs").main([])
    out = capsys.readouterr().out
    (right,) = numbers(r"(\d+) of 300 right", out)
    sure, sure_right = numbers(r"(\d+) at least 95% sure, (\d+) of them right", out)
    assert 270 <= right < 300
    assert 200 <= sure < 300
    assert sure_right >= sure - 2, "who is sure is hardly ever wrong"
    least = [float(share) for share in re.findall(r"^ +([\d.]+)% \w+ ", out, re.MULTILINE)]
    assert len(least) == 3 and least == sorted(least) and least[-1] < 95


@pytest.mark.slow
def test_a_killed_job_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert script("resume_job").main([]) == 0
    out = capfd.readouterr().out
    written, safe = numbers(r"killed with (\d+) answers written, of which (\d+) were safe", out)
    assert 100 <= written < 600 and 0 < safe <= written
    assert "600 rows asked, 600 answered, each once: yes" in out
    assert "safe rows that ran again: 0" in out


# ---- their parts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(EXAMPLES / "extract" / "model", plan="T1") as llm:
        yield llm


def test_rows_without_text_and_rows_that_are_too_long(llm: LLM, tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    orders = [row["message"] for row in labelled()[:5]]
    texts = [orders[0], "word " * 2000, None, *orders[1:]]
    table = pa.table({"n": list(range(7)), "text": texts, "tags": [["a"], None, [], ["b"], [], [], []]})
    pq.write_table(table, source, row_group_size=2)
    module = script("summarise_parquet")
    module.GROUP = 3
    assert module.summarise(llm, source, target, "text", 160) == (7, 1)
    after = pq.read_table(target)
    assert after.drop_columns(["summary"]).equals(table)
    summaries = after["summary"].to_pylist()
    assert summaries[1] is None and summaries[2] is not None
    read = [json.loads(summary) for summary in (summaries[0], *summaries[3:])]
    assert read == [row["fields"] for row in labelled()[:5]]


def test_a_report_names_what_was_taken_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    module = script("evaluate")
    right = {"city": "Lyon", "items": [{"product": "pliers", "quantity": 2}]}
    wrong = {"city": "Lyon", "items": [{"product": "pliers", "quantity": 20}]}
    broken = module.fields_of('{"city":"Ly')
    assert broken == module.fields_of("[1]") == {}
    module.report("mine", [right, wrong, wrong, broken], [right] * 4)
    assert capsys.readouterr().out.splitlines() == [
        "mine: 1 of 4 exactly right (25.0%)",
        "  city       75.0%",
        "  items      25.0%",
        "    2 x items.0.quantity: 2 read as 20",
        "    1 x city: 'Lyon' read as None",
        "    1 x items.0.product: 'pliers' read as None",
        "    1 x items.0.quantity: 2 read as None",
    ]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (
            '{"name":"Ada Berg","items":[{"product":"pliers","quantity":2}],"city":"Lyon","date":"2027-02-28"}',
            1,
        ),
        (
            '{"name":"Ada Berg","items":[{"product":"pliers","quantity":2}],"city":"Lyon","date":"2027-02-29"}',
            0,
        ),
        (
            '{"name":"Ada  bags","items":[{"product":"pliers","quantity":2}],"city":"Lyon","date":"2027-02-28"}',
            0,
        ),
        (
            '{"name":"Ada Berg","items":[{"product":"pliers","quantity":3}],"city":"Lyon","date":"2027-02-28"}',
            0,
        ),
        ('{"name":"Ada Berg","items":[{"product":"pliers","quantity":2}],"city":"Lyon"}', 0),
        ('{"name":"Ada Berg","items":[{"product":"pliers"', 0),
        ('["name"]', 0),
        ("7", 0),
    ],
)
def test_what_passes_as_an_order(text: str, passes: int) -> None:
    asked = {"items": [{"product": "pliers", "quantity": 2}], "city": "Lyon"}
    order = script("synthesise").valid(text, asked)
    assert order == (json.loads(text) if passes else None)


def test_the_label_whose_token_is_most_likely() -> None:
    def output(**tokens: float) -> RequestOutput:
        top = {i: TokenLogprob(logprob, text=text) for i, (text, logprob) in enumerate(tokens.items())}
        completion = CompletionOutput(index=0, token_ids=[0], logprobs=[top])
        return RequestOutput(request_id="0", prompt=None, prompt_token_ids=(1,), outputs=[completion])

    choose, labels = script("score_logprobs").choose, ["negative", "neutral", "positive"]
    assert choose(output(the=0.0, pos=-1.0, neg=-2.0), labels) == (
        "positive",
        pytest.approx(0.3679, abs=1e-4),
    )
    assert choose(output(neutral=-0.5, pos=-1.0), labels)[0] == "neutral"
    assert choose(output(the=0.0), labels)[1] == 0.0


def test_a_job_that_ends_too_early_to_be_killed(tmp_path: Path) -> None:
    module = script("resume_job")
    torn = tmp_path / "answers.part"
    torn.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert module.lines_of(torn) == [{"a": 1}, {"a": 2}]
    with pytest.raises(SystemExit, match=r"exit code 2.* before 3 answers"):
        module.kill_midway([sys.executable, "-c", "raise SystemExit(2)"], torn, 3)


# ---- their surroundings -----------------------------------------------------------------------------------


def test_the_table_has_every_script() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for path in sorted((EXAMPLES / "cookbook").glob("*.py")):
        command = f".venv/bin/python examples/cookbook/{path.name}\n"
        assert command in readme and command in path.read_text()
        assert f"(cookbook/{path.name})" in readme


def test_the_data_are_what_their_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "extract"))
    module = script("data/make")
    module.HERE = tmp_path
    module.main()
    assert (tmp_path / "orders.jsonl").read_bytes() == (DATA / "orders.jsonl").read_bytes()
    assert pq.read_table(tmp_path / "orders.parquet").equals(pq.read_table(DATA / "orders.parquet"))
