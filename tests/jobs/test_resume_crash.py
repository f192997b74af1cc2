"""A job that stops at every single operation on its files, and goes on from what the crash left.

After each: every row has exactly one line, the right one, and no row ran again whose group was in the journal.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.jobs.base import JobOptions
from seesaw.jobs.disk import JobFiles
from seesaw.jobs.journal import Kind, replay
from seesaw.jobs.manifest import read_manifest
from tests.jobs.crash_disk import CrashDisk, LazyDisk, State
from tests.jobs.echo_engine import EchoEngine
from tests.jobs.small_job import BAD, Strict, check, committed, lay_out, make_folder, options_in, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def crash_everywhere(
    options: JobOptions, folder: Path, engine: EchoEngine, *, goes_on: bool, bad: set[int]
) -> list[State]:
    """Run with a crash after each operation; go on from each with the same command and check the end.

    `goes_on` is whether the engine is the strict one again.
    """
    disk = CrashDisk(folder)
    summary = run(options, engine, disk)
    disk.release()
    assert not summary.interrupted
    check(options, bad, ordered=options.ordered)
    final = {path.name for path in folder.iterdir()}
    assert not any(name.endswith((".new", ".finishing", ".part")) for name in final)
    for state in disk.states:
        lay_out(folder, state)
        resume_and_check(options, folder, strict=goes_on, bad=bad)
        assert {path.name for path in folder.iterdir()} == final
    return disk.states


def resume_and_check(options: JobOptions, folder: Path, *, strict: bool, bad: set[int]) -> None:
    files = JobFiles(options.output_path, options.errors_path)
    before = committed(files)
    engine = Strict(strict=strict)
    run(options, engine, LazyDisk())
    check(options, bad, ordered=options.ordered)
    ran = {int(request.id[1:]) + 1 for request in engine.requests}
    kept = {n for n, kind in before.items() if kind is Kind.ANSWER or not options.retry_errors}
    assert not ran & kept, "rows ran again that were safe"


@pytest.mark.parametrize("ordered", [False, True])
def test_a_job_that_stops_anywhere(ordered: bool, folder: Path) -> None:
    options = options_in(folder, ordered=ordered)
    states = crash_everywhere(options, folder, Strict(), goes_on=True, bad=BAD)
    assert len(states) > 45


def test_a_job_that_died_as_it_ended_is_ended_even_with_force(folder: Path) -> None:
    options = options_in(folder)
    states = crash_everywhere(options, folder, Strict(), goes_on=True, bad=BAD)
    ended = 0
    for state in states:
        if b'"state": "finishing"' not in state.get("out.jsonl.manifest.json", b""):
            continue
        ended += 1
        lay_out(folder, state)
        engine = Strict()
        run(replace(options, force=True), engine, LazyDisk())
        assert not engine.requests
        check(options, BAD)
    assert ended > 3


def test_a_job_that_stops_again_as_it_goes_on(folder: Path) -> None:
    options = options_in(folder)
    states = crash_everywhere(options, folder, Strict(), goes_on=True, bad=BAD)
    for state in random.Random(0).sample(states, 3):
        lay_out(folder, state)
        crash_everywhere(options, folder, Strict(), goes_on=True, bad=BAD)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("strict", [False, True], ids=["answered", "failed again"])
def test_failed_rows_of_a_complete_job_run_again(ordered: bool, strict: bool, folder: Path) -> None:
    options = options_in(folder, ordered=ordered)
    run(options, Strict(), LazyDisk())
    retry = replace(options, retry_errors=True)
    engine = Strict(strict=strict)
    crash_everywhere(retry, folder, engine, goes_on=strict, bad=BAD if strict else set())
    assert {request.id for request in engine.requests} == {f"r{i}" for i in BAD}


@pytest.mark.parametrize("strict", [False, True], ids=["answered", "failed again"])
def test_failed_rows_of_an_interrupted_job_run_again(strict: bool, folder: Path) -> None:
    options = options_in(folder)
    assert run(options, Strict(fail_after=17), LazyDisk()).interrupted
    retry = replace(options, retry_errors=True)
    bad = BAD if strict else set()
    crash_everywhere(retry, folder, Strict(strict=strict), goes_on=strict, bad=bad)


def test_a_round_that_died_as_it_began_goes_on_without_the_option(folder: Path) -> None:
    options = options_in(folder)
    run(options, Strict(), LazyDisk())
    disk = CrashDisk(folder)
    run(replace(options, retry_errors=True), Strict(), disk)
    disk.release()
    begun = 0
    for state in disk.states:
        lay_out(folder, state)
        files = JobFiles(options.output_path, options.errors_path)
        manifest = read_manifest(files.manifest)
        if (
            manifest is None
            or manifest.state != "complete"
            or replay(files.journal).header.round == manifest.round
        ):
            continue
        begun += 1
        engine = Strict(strict=False)
        run(options, engine, LazyDisk())
        assert len(engine.requests) == len(BAD)
        check(options, set())
    assert begun


def test_a_round_that_was_stopped_goes_on_without_trying_twice(folder: Path) -> None:
    options = options_in(folder)
    run(options, Strict(), LazyDisk())
    retry = replace(options, retry_errors=True)
    assert run(retry, Strict(fail_after=2), LazyDisk()).interrupted
    engine = Strict()
    summary = run(retry, engine, LazyDisk())
    assert (len(engine.requests), summary.rows_failed) == (2, len(BAD))
    check(options, BAD)
    engine = Strict()
    run(retry, engine, LazyDisk())
    assert len(engine.requests) == len(BAD)
