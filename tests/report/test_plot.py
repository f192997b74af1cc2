"""The page that draws a ranking."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from seesaw.report.causes import CAUSES
from seesaw.report.plot import buffer_figure, page, rate_figure, time_figure
from tests.report.planned import RESHARDED, STATIC, candidate, ranking


def test_the_page_stands_alone() -> None:
    text = page(ranking(), profile=None, notes=["<b>careful</b>"])
    assert text.count('class="figure"') == text.count("Plotly.newPlot(") == 3
    assert not re.search(r"<(script|link|img)[^>]*(src|href)\s*=", text)
    assert "plotly.js v" in text
    assert "Run P4-&gt;T4: 2,000 tokens/s" in text
    assert "&lt;b&gt;careful&lt;/b&gt;" in text and "<b>careful</b>" not in text


def test_plotly_knows_everything_in_the_figures() -> None:
    from plotly.graph_objects import Figure

    found = ranking()
    for figure in (time_figure(found), buffer_figure(found), rate_figure(found)):
        assert figure is not None
        assert Figure(figure).to_dict()["data"]


def test_bars_follow_each_other_and_add_up() -> None:
    traces = {trace["name"]: trace for trace in time_figure(ranking())["data"]}
    assert set(traces) == {
        CAUSES[cause].name
        for cause in ("weights", "arithmetic", "all_reduce", "hand_over", "bubble", "transition")
    }
    rows: dict[int, list[tuple[float, float]]] = {}
    for trace in traces.values():
        for row, base, length in zip(trace["y"], trace["base"], trace["x"], strict=True):
            rows.setdefault(row, []).append((base, base + length))
    ends = {row: (min(b for b, _ in spans), max(e for _, e in spans)) for row, spans in rows.items()}
    assert ends == {1: (0, 80), 2: (80, 190), 3: (190, 200), 5: (0, 250)}


def test_bars_tell_times_of_the_whole_job() -> None:
    (head, *_) = time_figure(ranking(candidate("P4->T4", RESHARDED, scale=3.0)))["layout"]["annotations"]
    assert head["text"] == "<b>P4-&gt;T4</b>: 667 tokens/s, 10 min 00 s"


def test_the_buffer_is_drawn_where_it_is_used() -> None:
    figure = buffer_figure(ranking())
    assert figure is not None
    assert figure["data"][0]["y"] == [0.0, 0.9, 0.0]
    assert buffer_figure(ranking(candidate("T4", STATIC))) is None
    assert "Host buffer" not in page(ranking(candidate("T4", STATIC)), profile=None, notes=[])


def test_every_candidate_has_a_dot() -> None:
    figure = rate_figure(ranking())
    dots = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert dots == {
        "re-shards, replayed": [2000.0],
        "static, estimated": [pytest.approx(1777.8, abs=0.1)],
        "static, replayed": [1600.0],
    }
    assert [note["text"] for note in figure["layout"]["annotations"]] == [
        "<b>P4-&gt;T4</b>",
        "<b>T4</b> (best static)",
    ]


def test_the_best_static_plan_is_drawn_even_where_it_is_far_behind() -> None:
    fast = [candidate(plan, RESHARDED) for plan in ("P4->T4", "T4->P4", "D2T2->T4") for _ in range(4)]
    found = ranking(*fast, candidate("T4", replace(STATIC, seconds=900.0)))
    heads = [note["text"] for note in time_figure(found)["layout"]["annotations"]]
    assert len(heads) == 10 and "(best static plan)" in heads[-1]
