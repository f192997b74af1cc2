"""Alternation, failures and standing still, with contestants that have no engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from seesaw.bench import runner, sessions
from seesaw.bench.contestant import Contestant
from seesaw.bench.process import ContestantError, Guard, JsonProcess
from seesaw.bench.results import comparisons, ratio
from seesaw.bench.runner import Bench, BenchOptions, BenchResult
from seesaw.bench.shapes import model_directory
from seesaw.bench.workloads import Workload, parse_workload
from seesaw.models.hf_config import load_spec

FAKE = str(Path(__file__).with_name("fake.py"))
ROOT = str(Path(__file__).parents[2])


def fake(name: str, log: Path, failure: str = "") -> Contestant:
    return Contestant(name=name, kind="fake", command=(sys.executable, FAKE, name, str(log), failure))


def bench(tmp_path: Path, *contestants: Contestant, rounds: int, fresh: bool = False) -> BenchResult:
    model = model_directory("tiny", tmp_path / "model")
    options = BenchOptions(rounds=rounds, floor=False, fresh=fresh, start_timeout=60, run_timeout=20)
    workloads = [parse_workload("6x5->2"), parse_workload("7x5->2")]
    return Bench(model, load_spec(str(model)), options, tmp_path).run(workloads, contestants)


def test_contestants_take_turns_in_an_order_that_rotates(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = bench(tmp_path, *(fake(name, log) for name in "abc"), rounds=2)
    lines = [line.split() for line in log.read_text().splitlines()]
    warm, first, second = [f"{n} 4" for n in "abc"], [f"{n} 6" for n in "abc"], [f"{n} 6" for n in "bca"]
    turns = [f"{name} {count}" for name, count, _ in lines]
    assert turns[:9] == [x for pair in zip(warm, first, strict=True) for x in pair] + second
    assert turns[9:] == [turn.replace(" 6", " 7") for turn in turns[:9]]
    prompts = {first for _, count, first in lines if count == "6"}
    assert len(prompts) == 1  # the same for all
    result = found.results[0]
    assert [entry.seconds for entry in result.entries] == [6.0] * 3
    assert [entry.rate for entry in result.entries] == [7.0] * 3
    assert ratio(result.entries[0], result.entries[1]) == 1.0
    assert result.entries[0].phases() == {"prefill": 1.5, "decode": 4.5}
    assert all(0 <= run.others <= 1 for entry in result.entries for run in entry.runs)
    assert comparisons(result) == []  # none is Seesaw's
    assert result.entries[0].about["options"] == {"dtype": "bfloat16", "max_model_len": 16}
    assert not found.interrupted


def test_those_that_do_not_fit_together_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"

    def available() -> int:
        commands = [child.cmdline() for child in psutil.Process().children(recursive=True)]
        return 25 - 10 * sum(FAKE in command for command in commands)

    monkeypatch.setattr(runner, "available_memory", available)
    bench(tmp_path, *(replace(fake(name, log), memory=10) for name in "abc"), rounds=2)
    turns = ["".join(line.split()[:2]) for line in log.read_text().splitlines()]
    # c takes the place of a, which ran longest ago; then a that of b
    assert turns[:10] == ["a4", "a6", "b4", "b6", "c4", "c6", "b6", "c6", "a4", "a6"]


def test_one_that_does_not_fit_alone_is_run_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "available_memory", lambda: 1 << 30)
    found = bench(tmp_path, replace(fake("a", tmp_path / "log"), memory=3 << 30), rounds=1)
    assert len(found.results[0].entries[0].runs) == 1
    assert "a may come to take 3.00 GiB, and 1.00 GiB are free" in caplog.text


def test_one_that_is_started_anew_warms_up_each_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bench(tmp_path, fake("a", log), rounds=2, fresh=True)
    assert [line.split()[1] for line in log.read_text().splitlines()] == [
        "4",
        "6",
        "4",
        "6",
        "4",
        "7",
        "4",
        "7",
    ]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("open", "RuntimeError: no such engine"),
        ("run", "RuntimeError: out of luck"),
        ("die", "ended with exit code 7; its last message was: alas"),
    ],
)
def test_one_that_fails_does_not_end_the_others(failure: str, said: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = bench(tmp_path, fake("bad", log, failure), fake("good", log), rounds=2)
    for result in found.results:
        bad, good = result.entries
        assert bad.error == said
        assert (bad.runs, bad.rate, bad.seconds) == ([], None, None)
        assert ratio(bad, good) is None
        assert good.error is None
        assert len(good.runs) == 2
        if failure != "open":
            assert not alive(bad.about["child"])
        assert not alive(good.about["child"])


def test_one_that_does_not_answer_is_given_up(tmp_path: Path, processes: Callable[..., JsonProcess]) -> None:
    process = processes("mute")
    with pytest.raises(ContestantError, match="no answer in time"):
        process.ask(RUN, 0.5)
        process.ask(RUN, 0.5)
    process.close(patience=0.1)
    assert sessions.members(process.session) == {}


# ---- standing still -------------------------------------------------------------------------------------------

RUN = {"op": "run", "prompts": [[1]], "outputs": [1]}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[..., JsonProcess]]:
    """Starts fakes with their engines open."""
    started: list[JsonProcess] = []
    with Guard() as guard:

        def start(failure: str = "") -> JsonProcess:
            command = fake("a", tmp_path / "log", failure).command
            process = JsonProcess(command, guard=guard, log=tmp_path / "messages")
            started.append(process)
            process.ask({"op": "open", "model": "m", "options": {}}, 60)
            return process

        yield start
        for process in started:
            process.close(patience=1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_frozen_session_stands_still_and_goes_on(processes: Callable[..., JsonProcess]) -> None:
    process, other = processes(), processes()
    assert len(sessions.members(process.session)) == 2  # with its child
    process.freeze()
    assert set(sessions.members(process.session).values()) == {"T"}
    assert "T" not in sessions.members(other.session).values()
    process.thaw()
    assert "T" not in sessions.members(process.session).values()
    assert process.ask(RUN, 20)["output_tokens"] == 1
    process.freeze()
    process.close()  # a frozen one can be closed
    assert sessions.members(process.session) == {}


def test_processor_time_is_that_of_the_whole_session(processes: Callable[..., JsonProcess]) -> None:
    process = processes()
    used, machine = sessions.processor_seconds(process.session), sessions.machine_seconds()
    assert 0 < used < machine
    process.close()
    assert sessions.processor_seconds(process.session) == 0


def test_what_an_engine_prints_is_kept_from_the_answers(
    processes: Callable[..., JsonProcess], tmp_path: Path
) -> None:
    process = processes()
    assert process.ask(RUN, 20)["event"] == "result"
    process.close()
    assert "engines print things" in (tmp_path / "messages").read_text()


def test_a_bench_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """Not even what stood still at that moment."""
    program = f"""
import sys, time
from pathlib import Path
from seesaw.bench.process import Guard, JsonProcess
process = JsonProcess({fake("a", tmp_path / "log").command!r}, guard=Guard(), log=Path({str(tmp_path / "m")!r}))
process.ask({{"op": "open", "model": "m", "options": {{}}}}, 60)
process.freeze()
print(process.session, flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        session = int(owner.stdout.readline())
        assert set(sessions.members(session).values()) == {"T"}
        os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while sessions.members(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sessions.members(session) == {}


def test_an_interrupted_bench_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    started = JsonProcess.ask

    def interrupted(self: JsonProcess, message: dict[str, object], timeout: float) -> dict[str, object]:
        if log.exists() and len(log.read_text().splitlines()) == 4:
            raise KeyboardInterrupt
        return started(self, message, timeout)

    monkeypatch.setattr(JsonProcess, "ask", interrupted)
    found = bench(tmp_path, fake("a", log), fake("b", log), rounds=2)
    assert found.interrupted
    assert [len(entry.runs) for entry in found.results[0].entries] == [1, 1]
    assert not any(alive(entry.about["child"]) for entry in found.results[0].entries)


def test_workloads_are_told_apart_by_their_requests() -> None:
    assert Workload("a", ((1, 1),)) != Workload("a", ((1, 2),))
