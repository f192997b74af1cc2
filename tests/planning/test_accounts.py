"""The book of a simulation: intervals on both sides of a phase's end, and latencies in cells of 1 %."""

from __future__ import annotations

import numpy as np
import pytest

from seesaw.planning.accounts import BUBBLE, CAUSES, SWAP, Accounts
from seesaw.planning.latency import Histogram, LatencyMeter


def test_an_interval_is_shared_out_where_a_phase_ends() -> None:
    book = Accounts(("prefill", "decode", "transition"))
    book.begin("transition", 4.0)
    book.begin("decode", 5.0)
    book.book_all({0: 4.0, SWAP: 4.0}, 2.0, 10.0, weight=0.5)
    book.book(BUBBLE, 0.0, 2.0, weight=0.5)
    report = book.report(10.0)
    assert [report[name].seconds for name in ("prefill", "transition", "decode")] == [4.0, 1.0, 5.0]
    assert report["prefill"].causes["bubble"] == 1.0
    for name, seconds in (("prefill", 1.0), ("transition", 0.5), ("decode", 2.5)):
        assert report[name].causes["swap"] == report[name].causes[CAUSES[0]] == pytest.approx(seconds / 2)
        assert tuple(report[name].causes) == CAUSES


def test_phases_take_turns_and_never_overlap() -> None:
    book = Accounts(("prefill", "decode"))
    book.begin("decode", 3.0)
    book.begin("prefill", 2.0)  # another replica was late: the decode phase has no time of its own
    book.begin("decode", 6.0)
    assert book.within(5.0) is None and book.within(6.0) is not None
    book.book(BUBBLE, 1.0, 7.0, weight=1.0)
    report = book.report(8.0)
    assert report["prefill"].seconds == 6.0 and report["decode"].seconds == 2.0
    assert report["prefill"].causes["bubble"] == 5.0 and report["decode"].causes["bubble"] == 1.0


def test_a_phase_that_would_begin_after_the_end_has_no_time() -> None:
    book = Accounts(("prefill", "decode"))
    book.begin("decode", 9.0)
    report = book.report(5.0)
    assert report["prefill"].seconds == 5.0 and report["decode"].seconds == 0.0


def test_batches_are_means_over_forwards() -> None:
    book = Accounts(("mixed",))
    for tokens, sampled in ((100, 2), (8, 8)):
        book.count("mixed", tokens, sampled)
    report = book.report(1.0)["mixed"]
    assert (report.forwards, report.tokens, report.batch) == (2, 108, 5.0)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_percentiles_are_right_within_half_a_per_cent(scale: float) -> None:
    values = np.random.default_rng(3).lognormal(0.0, 1.0, 5000) * scale
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    exact = np.percentile(values, (50, 90, 99), method="inverted_cdf")
    assert list(histogram.percentiles()) == [50, 90, 99]
    assert list(histogram.percentiles().values()) == pytest.approx(list(exact), rel=0.0051)


def test_few_values_have_percentiles_too() -> None:
    histogram = Histogram()
    assert histogram.percentiles() == {}
    histogram.add(0.0)
    assert histogram.percentiles() == {50: 0.0, 90: 0.0, 99: 0.0}
    histogram.add(2.0)
    assert histogram.percentiles() == {
        50: 0.0,
        90: pytest.approx(2.0, rel=0.005),
        99: pytest.approx(2.0, rel=0.005),
    }


def test_every_gap_between_tokens_counts() -> None:
    meter = LatencyMeter()
    meter.arrived(1, 0.0)
    meter.arrived(2, 0.5)
    for now, requests in ((1.0, [1, 2]), (1.5, [1, 2]), (9.5, [1])):
        meter.tokens(requests, now)
    meter.finished(2, 1.5)
    meter.finished(1, 9.5)
    found = meter.latency()
    assert found.ttft == {
        share: pytest.approx(value, rel=0.005) for share, value in ((50, 0.5), (90, 1), (99, 1))
    }
    assert found.inter_token[50] == pytest.approx(0.5, rel=0.005)
    assert found.inter_token[90] == pytest.approx(8.0, rel=0.005)
    assert found.end_to_end[99] == pytest.approx(9.5, rel=0.005)
