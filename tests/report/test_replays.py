"""Replays on the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from seesaw.core.layout import Plan
from seesaw.planning.bound import Bound
from seesaw.planning.setup import set_up
from seesaw.planning.twin import Simulated
from seesaw.report.causes import Job
from seesaw.report.replays import Replay, comparison_table, fill_line, result, show_comparison, show_replay
from tests.report.planned import LATENCY, LIMITS, MODEL, RESHARDED, STATIC

BOUND = Bound(seconds=100.0, prefill_seconds=60.0, decode_seconds=40.0, flops=1.0, bytes=2.0)


def replay(text: str, simulated: Simulated) -> Replay:
    setup = set_up(MODEL, Plan.parse(text), "bfloat16", LIMITS)
    return Replay(name=text, limits=LIMITS, setup=setup, simulated=simulated)


def shown(show: Callable[[Console], None]) -> str:
    """What is printed at 100 columns, each run of spaces as one."""
    out = io.StringIO()
    show(Console(width=100, file=out, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert "…" not in out.getvalue()
    return " ".join(out.getvalue().split())


def test_the_result_in_a_sentence() -> None:
    assert result(Job("P4->T4", RESHARDED)) == (
        "P4->T4: 2,000 tokens/s, 5.00 rows/s; 1,000 requests (300,000 tokens in, 100,000 out) in 3 min 20 s; "
        "bound by reading weights in decode."
    )


def test_one_plan_in_full() -> None:
    text = shown(lambda console: show_replay(replay("P4->T4", RESHARDED), BOUND, console))
    assert "policy seesaw, chunk of 512 tokens, at most 256 sequences on a replica" in text
    assert "prefill 1 min 20 s 40% 600 100 8.0 750" in text
    assert "4 transitions of 2.5 s on average" in text
    assert "3 sequences swapped out to make room, 0 computed again" in text
    assert "90% full at most" in text
    assert "P4->T4 reaches 50% of it" in text
    assert "Latencies" not in text


def test_latencies_where_requests_arrive() -> None:
    arriving = replace(RESHARDED, latency=LATENCY)
    text = shown(lambda console: show_replay(replay("P4->T4", arriving), BOUND, console))
    assert "to the first token 0.5 s 1.5 s 1 min 10 s" in text
    assert "between tokens 20 ms 30 ms 0.2 s" in text


def test_latencies_of_answers_of_one_token() -> None:
    arriving = replace(RESHARDED, latency=replace(LATENCY, inter_token={}))
    both = [replay("P4->T4", arriving), replay("T4", replace(STATIC, latency=LATENCY))]
    assert "between tokens – – –" in shown(lambda console: show_replay(both[0], BOUND, console))
    assert "P4->T4 0.5 s / 1 min 10 s – 4.0 s / 1 min 39 s" in shown(
        lambda console: show_comparison(both, BOUND, console)
    )


def test_several_side_by_side() -> None:
    failed = Replay(name="D4", limits=LIMITS, error="plan D4 does not fit")
    both = [replay("T4", STATIC), failed, replay("P4->T4", RESHARDED)]
    text = shown(lambda console: show_comparison(both, BOUND, console))
    assert "T4 1,600 4.00 1.00 250 – – 0 40% all-reduce" in text
    assert "P4->T4 2,000 5.00 1.25 200 80.0 110 4 50% reading weights in decode" in text
    assert "refused D4: plan D4 does not fit" in text


def test_settings_stand_below_a_plan() -> None:
    one = replace(replay("P4->T4", RESHARDED), name="P4->T4:seesaw@chunk=512,max_running=64")
    assert comparison_table([one], BOUND).column(0) == ["P4->T4\n:seesaw\n@chunk=512,\nmax_running=64"]


@pytest.mark.parametrize(
    ("buffer", "drawn"),
    [
        (((0.0, 0.0), (100.0, 0.5), (150.0, 0.0)), " " * 30 + "█" * 16 + " " * 14),
        (((0.0, 0.25), (100.0, 1.0)), "▃" * 30 + "█" * 30),
    ],
)
def test_the_fill_line(buffer: tuple[tuple[float, float], ...], drawn: str) -> None:
    assert fill_line(replace(RESHARDED, buffer=buffer)) == drawn
