"""The end-of-run summary: every number in its place, within 100 columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.stats import EngineStats, RankLoss, TransitionRecord
from seesaw.report.summary import format_seconds, format_summary

GIB = 1 << 30
STATS = EngineStats(
    plan="P4->T4",
    phase="idle",
    requests_waiting=0,
    requests_running=0,
    requests_finished=999_000,
    requests_failed=0,
    prompt_tokens=1_200_000_000,
    output_tokens=150_000_000,
    elapsed_seconds=10_000.0,
    seconds_per_phase={"prefill": 3000.0, "decode": 6500.0, "transition": 100.0},
    transitions=tuple(TransitionRecord(t, 30 * GIB, 2.0, "delta") for t in ("T4", "P4") * 25),
    swapped_out_bytes=900 * GIB,
    swapped_in_bytes=800 * GIB,
    preemptions_swapped=1234,
    preemptions_recomputed=5,
    device_memory_peak_bytes=(18 * GIB, 19 * GIB, 19 * GIB, 19 * GIB),
    device_memory_budget_bytes=20 * GIB,
    host_kv_peak_bytes=60 * GIB,
    host_kv_budget_bytes=64 * GIB,
)


def test_summary_of_a_long_run() -> None:
    text = format_summary(
        STATS,
        rows_answered=999_000,
        rows_failed=1_000,
        failures={"invalid_json": 990, "context_length_exceeded": 10},
        elapsed_seconds=10_000.0,
        files=[("output", Path("out.jsonl"))],
    )
    assert text.splitlines() == [
        "rows          999,000 answered, 1,000 failed",
        "              invalid_json 990, context_length_exceeded 10",
        "tokens        1,200,000,000 in (120,000/s), 150,000,000 out (15,000/s)",
        "time          2 h 46 min: decode 65%, prefill 30%, transition 1%",
        "plan          P4->T4",
        "transitions   25 to P4 (delta): 750.0 GiB in 50.0 s, 30.0 GiB and 2,000 ms each",
        "              25 to T4 (delta): 750.0 GiB in 50.0 s, 30.0 GiB and 2,000 ms each",
        "host buffer   peak 60.0 GiB of 64.0 GiB (94%); swapped out 900.0 GiB, in 800.0 GiB",
        "preemptions   1,234 swapped, 5 recomputed",
        "device        4 ranks, peak 19.0 GiB of 20.0 GiB (95%) per rank (least 18.0 GiB)",
        "output        out.jsonl",
    ]


def test_many_codes_stay_within_the_width() -> None:
    failures = {f"a_rather_long_code_number_{i}": i for i in range(20)}
    text = format_summary(STATS, rows_answered=0, rows_failed=190, failures=failures, elapsed_seconds=1.0)
    assert max(map(len, text.splitlines())) <= 100
    assert "a_rather_long_code_number_19 19" in text
    assert "others 91" in text


def test_a_run_in_which_nothing_happened() -> None:
    empty = replace(
        STATS,
        prompt_tokens=0,
        output_tokens=0,
        seconds_per_phase={},
        transitions=(),
        device_memory_peak_bytes=(),
        host_kv_budget_bytes=0,
        host_kv_peak_bytes=0,
    )
    text = format_summary(empty, rows_answered=0, rows_failed=0, elapsed_seconds=0.0)
    assert "transitions   none" in text
    assert "0 in (0/s), 0 out (0/s)" in text
    assert "peak 0 B of 0 B;" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (125.2, "2 min 05 s"),
        (11_220, "3 h 07 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_lost_ranks() -> None:
    losses = (
        RankLoss(
            reason="killed",
            ranks=(1, 3),
            before="P4->T4",
            after="P2->T2",
            kept=1200,
            restarted=31,
            seconds=2.0,
        ),
        RankLoss(
            reason="hangs", ranks=(0,), before="P2->T2", after="T1->T1", kept=5, restarted=2, seconds=1.5
        ),
    )
    text = format_summary(
        replace(STATS, rank_losses=losses), rows_answered=1, rows_failed=0, elapsed_seconds=1.0
    )
    first = "lost ranks    1, 3 of P4->T4, on under P2->T2 after 2.0 s; 1,200 sequences kept, 31 restarted"
    assert first in text.splitlines()
    assert "              0 of P2->T2, on under T1->T1 after 1.5 s; 5 sequences kept, 2 restarted" in text
