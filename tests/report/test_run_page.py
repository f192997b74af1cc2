"""The page of a run: what it says, that it stands alone, and that a browser can draw it."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from seesaw.recording.prediction import Prediction, predict
from seesaw.recording.record import Record
from seesaw.report import run_figures as figures
from seesaw.report.run_page import answer, page
from seesaw.report.run_view import JobView
from tests.report.runs import SETUP, empty, record, run, static

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PREDICTION = Prediction(
    seconds=8.0,
    phases={"prefill": 2.0, "transition": 0.05, "decode": 5.0},
    transitions=1.0,
    replayed=100,
    sequences=100,
)


def visible(text: str) -> str:
    """What is to be read on a page."""
    body = text[text.index("<main>") : text.index("</main>")]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_stands_alone() -> None:
    text = page(record(run(command={"model": "<m>", "input": ["a"], "output": "o"})), PREDICTION)
    assert text.count('class="figure"') == text.count("Plotly.newPlot(") == 7
    assert not re.search(r"<(script|link|img)[^>]*(src|href)\s*=", text)
    assert "a through &lt;m&gt;" in text and "<m>" not in text


def test_it_answers_first() -> None:
    assert answer(JobView(record())) == (
        "100 rows, 2 failed in 10.0 s: 10 rows/s, 600 tokens/s. Most of the time, 35%, went to the ranks' own work "
        "in decode."
    )
    text = visible(page(record(), PREDICTION))
    for said in ("98 rows answered", "2 rows failed", "500 prompt tokens/s", "P2->T2", "1 transition "):
        assert said.replace(">", "&gt;") in text, said


def test_times_of_a_phase_add_up() -> None:
    view = JobView(record())
    assert view.parts == {
        "prefill": {"ranks": 3.0, "sampling": 0.0, "control": 0.5, "files": 0.5},
        "decode": {
            "ranks": 3.5,
            "sampling": 0.5,
            "control": pytest.approx(0.4),
            "files": pytest.approx(0.6),
        },
        "transition": {"ranks": 1.0, "sampling": 0.0, "control": 0.0, "files": 0.0},
    }
    assert view.outside == 0.0


def test_predicted_and_measured() -> None:
    text = visible(page(record(), PREDICTION))
    assert "prefill 2.0 s 3.0 s 1.50" in text
    assert "transition 50 ms 1.0 s 20" in text
    assert "control process, files – 2.0 s –" in text
    assert "in all 8.0 s 10.0 s 1.25" in text
    assert "There is no prediction: because." in visible(page(record(), "because"))


def test_the_twin_predicts_the_run_as_it_was() -> None:
    found = predict(run())
    assert isinstance(found, Prediction)
    assert (found.replayed, found.sequences) == (100, 100)
    assert found.phases.keys() >= {"prefill", "decode"}
    assert 0 < sum(found.phases.values()) <= found.seconds * 1.001


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": "interrupted"}, "did not come to its end"),
        ({"plans": [(0.0, "T2"), (4.0, "P2->T2")]}, "the plan changed"),
        ({"setup": None}, "no figures of the machine"),
    ],
)
def test_what_cannot_be_predicted(changes: dict[str, object], why: str) -> None:
    found = predict(run(**changes))
    assert isinstance(found, str)
    assert why in found


def test_a_run_without_a_profile_says_what_would_be_added() -> None:
    import msgspec

    setup = msgspec.structs.replace(SETUP, hardware=None, no_hardware="there is no profile at /p")
    text = visible(page(record(run(setup=setup)), "there was no profile"))
    assert "(seesaw profile), made before a run, adds this: there is no profile at /p." in text
    assert "to compare with: the link&#x27;s limit" in text


def test_use_of_the_devices() -> None:
    from seesaw.recording.efficiency import phase_use
    from tests.report.runs import SPEC

    assert SETUP.hardware is not None
    use = phase_use(SPEC, "bfloat16", 2, SETUP.hardware, JobView(record()).total)["decode"]
    layer, head = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 64 * 1000
    assert use.flops == 2 * 900 * (2 * layer + head) + 2 * 4 * 64 * 49500
    assert use.bytes == 2 * (100 * (2 * layer + head) + 2 * 2 * 32 * 49500)
    assert use.arithmetic == pytest.approx(use.flops / (5.0 * 2 * SETUP.hardware.flops["bfloat16"]))
    assert use.bandwidth == pytest.approx(use.bytes / (5.0 * 2 * SETUP.hardware.bandwidth))


def test_sittings_lie_one_after_the_other() -> None:
    killed = run(state="running", elapsed_seconds=0.0)
    view = JobView(record(killed, run()))
    assert view.seconds == pytest.approx(20.0)
    assert [(round(begin, 6), phase) for begin, _, phase in view.phases] == [
        *[(0.0, "prefill"), (4.0, "transition"), (5.0, "decode")],
        *[(10.0, "prefill"), (14.0, "transition"), (15.0, "decode")],
    ]
    assert (view.answered, view.failures) == (196, [("invalid_json", 4)])
    text = visible(page(record(killed, run()), "x"))
    assert "98 rows answered, 2 failed, killed, or still running 2: 2026-11-21 10:00:00 UTC" in text


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (record(run(state="interrupted")), "The job was interrupted and can be resumed."),
        (record(run(state="failed", error="rank 1 died")), "The job failed: rank 1 died"),
        (record(run(state="running")), "The job was killed, or was still running when this was recorded"),
        (record(empty()), "The job was empty. 0 rows answered"),
        (record(empty(state="running", stats=None, timeline=[])), "No row has its line yet."),
        (record(empty(rows_failed=7, failures={"invalid_json": 7})), "7 rows, all failed in"),
        (record(empty(rows_failed=7, failures={})), "7 rows failed; the error file says why."),
        (record(static()), "both at once"),
    ],
)
def test_runs_of_every_kind_have_a_page(runs: Record, said: str) -> None:
    text = page(runs, "there is none")
    assert said in visible(text) or f'"{said}"' in text
    assert "nan" not in visible(text).lower()
    assert text.count('class="figure"') == text.count("Plotly.newPlot(")


def test_plotly_knows_everything_in_the_figures() -> None:
    from plotly.graph_objects import Figure

    from seesaw.report.run_page import _uses

    for runs in (record(), record(static()), record(run(), run())):
        view = JobView(runs)
        drawn = [
            figures.timeline_figure(view),
            figures.rate_figure(view),
            figures.time_figure(view),
            figures.use_figure(_uses(view)),
            figures.transition_figure(view),
            figures.length_figure(view),
            figures.failure_figure(view),
        ]
        for figure in filter(None, drawn):
            assert Figure(figure).to_dict()["data"]


def test_rates_add_up_to_the_count() -> None:
    points = [(i * 0.1, float(i * i)) for i in range(50)]
    found = figures.rates(points, 0.45)
    assert sum((end - begin) * rate for begin, end, rate in found) == pytest.approx(49 * 49)
    assert all(end - begin >= 0.45 for begin, end, _ in found[:-1])
    assert figures.rates([], 1.0) == []


@pytest.mark.parametrize(
    ("counts", "edges"),
    [
        ({48: 60, 50: 40}, [48, 50, 52]),
        ({5: 1}, [5, 6]),
        ({1: 50, 2: 50, 1024: 1}, [0, 4, 8, 12, 16, 20, 24, 28, 32, 40]),
    ],
)
def test_bins_hold_every_length(counts: dict[int, int], edges: list[int]) -> None:
    bins = figures.length_bins(counts)
    assert [low for low, _, _ in bins][: len(edges)] == edges[: len(bins)]
    assert all(one[1] == other[0] for one, other in pairwise(bins))
    assert sum(count for _, _, count in bins) == sum(counts.values())
    assert bins[0][0] <= min(counts) and bins[-1][1] > max(counts)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("runs", [record(), record(static(), run(state="interrupted")), record(empty())])
def test_a_browser_draws_every_figure_without_an_error(runs: Record, tmp_path: Path) -> None:
    text = page(runs, PREDICTION)
    watch = "<script>window.onerror = message => { document.title = 'error: ' + message }</script>"
    (tmp_path / "page.html").write_text(text.replace("<head>", f"<head>{watch}", 1))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "page.html")]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", drawn)
    assert title is not None and title.group(1) == "in.jsonl through models/m"
    assert drawn.count("js-plotly-plot") >= text.count("Plotly.newPlot(")
    shown = re.sub(r"<script.*?</script>", "", drawn, flags=re.S)
    assert len(re.findall(r'<svg class="main-svg"[^>]*width="\d{3,4}"', shown)) >= text.count(
        "Plotly.newPlot("
    )
