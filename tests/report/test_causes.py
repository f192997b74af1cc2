"""What limits a job, in words."""

from __future__ import annotations

import pytest

from seesaw.planning import accounts
from seesaw.report.causes import (
    CAUSES,
    Job,
    bound_by,
    cause_seconds,
    difference,
    limits,
    main_limit,
    time_text,
)
from tests.report.planned import RESHARDED, STATIC

OURS, THEIRS = Job("P4->T4", RESHARDED), Job("T4", STATIC)


def test_every_cause_of_the_twin_has_words() -> None:
    assert tuple(CAUSES) == accounts.CAUSES
    assert len({cause.name for cause in CAUSES.values()}) == len(CAUSES)


def test_the_largest_cause_of_a_phase_limits() -> None:
    assert main_limit(OURS) == ("decode", "weights", 0.4)
    assert bound_by(OURS) == "reading weights in decode"
    assert bound_by(THEIRS) == "all-reduce"


def test_causes_are_told_for_the_whole_job() -> None:
    double = Job("P4->T4", RESHARDED, scale=2.0)
    assert cause_seconds(double)["arithmetic"] == 140.0
    assert double.seconds == 400.0
    assert main_limit(double)[2] == 0.4


def test_limits_name_phases_and_what_would_help() -> None:
    text = limits(OURS)
    assert "prefill takes 40% of the time (35% is arithmetic)" in text
    assert "decode takes 55% of the time (40% is reading weights)" in text
    assert "transitions take 5% of the time" in text
    assert text.endswith(f"{CAUSES['weights'].remedy}.")
    assert limits(THEIRS).startswith("T4: 50% of its time is all-reduce.")


def test_the_difference_between_two_plans() -> None:
    assert difference(OURS, THEIRS) == (
        "Against T4, P4->T4 saves most in all-reduce: 30.0 s instead of 2 min 05 s, and pays most in reading "
        "weights: 1 min 20 s instead of 50.0 s."
    )
    assert difference(OURS, OURS) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.0123, "12 ms"), (0.5, "0.5 s"), (83, "1 min 23 s"), (7500, "2 h 05 min")],
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
