"""A ranking on the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from seesaw.report.causes import Job
from seesaw.report.ranking import (
    answer,
    folded,
    legend,
    plans_table,
    refusals,
    row,
    show_ranking,
    shown_candidates,
)
from seesaw.report.text import breakdown, gib, rate
from tests.report.planned import RESHARDED, STATIC, candidate, ranking


def test_the_answer_says_what_to_run_against_what_and_what_bounds_it() -> None:
    assert answer(ranking()) == (
        "Run P4->T4: 2,000 tokens/s (prompts and outputs), 3 min 20 s for the job; 1.25× the best static plan "
        "(T4: 1,600 tokens/s); bound by reading weights in decode."
    )


def test_the_answer_where_a_static_plan_wins() -> None:
    text = answer(ranking(candidate("T4", replace(STATIC, seconds=160.0)), candidate("P4->T4", RESHARDED)))
    assert "it is a static plan, 1.25× the best plan with separate phases (P4->T4: 2,000 tokens/s)" in text


def test_the_answer_where_there_is_but_one_kind() -> None:
    assert "no static plan fits" in answer(ranking(candidate("P4->T4", RESHARDED)))
    assert "no plan with separate phases came near it" in answer(ranking(candidate("T4", STATIC)))


def test_a_replayed_row_and_an_estimated_one() -> None:
    found = ranking()
    ours, static, estimated = (row(found, one) for one in (*found.replayed, *found.others))
    setup = found.best.setup
    assert setup is not None
    memory = [gib(max(setup.memory.weights)), gib(max(setup.memory.pool))]
    assert ours == ["P4->T4", "2,000", "5.00", "1.25", *memory, "512", "250", "4", "50%"]
    assert static[:4] == ["T4 (best static)", "1,600", "4.00", "1.00"]
    assert static[-2:] == ["–", "40%"]
    assert estimated == ["P2T2", "~1,778", "~4.44", "~1.11", "–", "–", "512", "250", "–", "~44%"]


def test_a_sample_counts_for_the_whole_job() -> None:
    found = ranking(candidate("P4->T4", RESHARDED, scale=2.0))
    assert row(found, found.best)[1] == "1,000"
    assert "6 min 40 s for the job" in answer(found)
    assert "1 plan replayed request by request" in legend(found)
    assert "500 of the 1,000 requests" in legend(
        ranking(candidate("P4->T4", replace(RESHARDED, requests=500)))
    )


@pytest.mark.parametrize(
    ("top", "names"), [(1, ["P4->T4", "T4"]), (2, ["P4->T4", "T4"]), (9, ["P4->T4", "T4", "P2T2"])]
)
def test_the_best_static_plan_is_always_shown(top: int, names: list[str]) -> None:
    found = ranking()
    assert [one.name for one in shown_candidates(found, top)] == names
    assert [name.split()[0] for name in plans_table(found, top).column(0)] == names


def test_refused_plans_are_counted() -> None:
    found = ranking()
    assert refusals(found) == "2 plans left out for want of memory: D4, D4->D4 (--json has the reasons)."
    many = replace(found, refused=tuple((f"D{n}", "no") for n in range(1, 91)))
    assert refusals(many).startswith("90 plans left out for want of memory: D1, D2, D3, D4 and 86 more (")


def test_a_breakdown_adds_up() -> None:
    grid = breakdown([Job("P4->T4", RESHARDED), Job("T4", STATIC)])
    headers = [column.header.split("\n") for column in grid.columns]
    assert [header[-1] for header in headers[1:-1]] == ["prefill", "decode", "transition", "in all", "in all"]
    cells = [grid.column(number) for number in range(len(grid.columns))]
    assert cells[0][-1] == "seconds" and [column[-1] for column in cells[1:-1]] == [
        "80.0",
        "110",
        "10.0",
        "200",
        "250",
    ]
    for column, total in zip(cells[1:-1], (40.0, 55.0, 5.0, 100.0, 100.0), strict=True):
        assert sum(float(cell) for cell in column[:-1] if cell != "–") == pytest.approx(total)


def test_a_command_folds_before_options() -> None:
    command = f"seesaw run --model path/to/model --input FILE --plan 'P8->T4P2' --ranks 8{' --chunk 512' * 8}"
    lines = folded(command).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 86
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert all(line.startswith("  --") for line in lines[1:])
    assert " ".join(line.removesuffix(" \\").strip() for line in lines) == command


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (3.6, "3.60"), (99.96, "100"), (1128.6, "1,129"), (0, "0")]
)
def test_rates(value: float, text: str) -> None:
    assert rate(value) == text


def _console(width: int) -> Console:
    return Console(width=width, record=True, file=io.StringIO())


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (2_300_000, "0.0021"), (1 << 29, "0.50"), (50 << 30, "50.0")]
)
def test_gib(size: int, text: str) -> None:
    assert gib(size) == text


def test_everything_stands_within_100_columns() -> None:
    console = _console(100)
    show_ranking(ranking(), console, profile=None, command="seesaw run", notes=["assumed [this]"], top=9)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    for piece in (
        "Llama-3.1-8B",
        "not measured on this box",
        "in=300,out=100",
        "something was assumed",
        "[this]",
    ):
        assert piece in text


def test_a_narrow_terminal_goes_without_some_columns() -> None:
    console = _console(70)
    show_ranking(ranking(), console, profile=None, command="seesaw run", notes=[], top=9)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 70
    table = text.split("Plans, best first")[1].split("tokens/s: prompts")[0]
    assert "rows/s" not in table and "chunk" not in table and "…" not in table
    assert "T4 (best static)" in table and "1.25" in table and "bound" in table
