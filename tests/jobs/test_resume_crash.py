"""A job that stops at every single operation on its files, and goes on from what the crash left.

After each: every row has exactly one line, the right one, and no row ran again whose group was in the journal.
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.jobs.base import JobOptions, JobSummary
from seesaw.jobs.disk import Disk, JobFiles
from seesaw.jobs.journal import Damage, Kind, replay
from seesaw.jobs.manifest import read_manifest
from seesaw.jobs.resume import open_job
from seesaw.jobs.runner import complete_summary, run_opened
from seesaw.jobs.writer import SyncWindow
from tests.jobs.contract import read
from tests.jobs.crash_disk import CrashDisk, LazyDisk, State
from tests.jobs.echo_engine import EchoEngine

ROWS = 24
BAD = {3, 9, 10, 20}
"""Rows, from 0, that cannot be served."""
WINDOW = SyncWindow(rows=5, seconds=60)


class Strict(EchoEngine):
    """Refuses rows of the prompt `no`, as long as it is told to; the others it answers with their prompt."""

    def __init__(self, *, strict: bool = True, fail_after: int | None = None) -> None:
        super().__init__(max_model_len=200 if strict else 10_000, fail_after=fail_after)


def rows() -> bytes:
    long = "x" * 300  # too long for the strict engine
    prompts = [long if i in BAD else f"prompt {i}" for i in range(ROWS)]
    return b"".join(b'{"id": "r%d", "prompt": "%s"}\n' % (i, p.encode()) for i, p in enumerate(prompts))


def run(options: JobOptions, engine: EchoEngine, disk: Disk) -> JobSummary:
    with open_job(options, disk=disk) as job:
        if job.complete:
            return complete_summary(job, engine.stats())
        return run_opened(engine, job, window=WINDOW)


def lay_out(folder: Path, state: State) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in state.items():
        (folder / name).write_bytes(content)


def committed(files: JobFiles) -> dict[int, Kind]:
    """Rows whose lines are safe, by number."""
    if not files.journal.exists() or not files.manifest.exists():
        return {}
    with suppress(Damage):
        found = replay(files.journal)
        manifest = read_manifest(files.manifest)
        if manifest is not None and found.header.job == int(manifest.job, 16) and not found.damage:
            return {int(row["a"]): Kind(row["kind"]) for row in found.rows()}
    return {}


def check(options: JobOptions, bad: set[int], *, ordered: bool = False) -> None:
    """The finished files: each row once, in the right file, with its answer."""
    answers, failures = read(options.output_path), read(options.errors_path)
    answered = [line["custom_id"] for line in answers]
    failed = [line["custom_id"] for line in failures]
    assert sorted(answered) == sorted(f"r{i}" for i in range(ROWS) if i not in bad)
    assert sorted(failed) == sorted(f"r{i}" for i in bad)
    if ordered:
        assert answered == sorted(answered, key=lambda name: int(name[1:]))
        assert failed == sorted(failed, key=lambda name: int(name[1:]))
    for line in answers:
        number = int(line["custom_id"][1:])
        text = line["response"]["body"]["choices"][0]["text"]
        assert text == ("x" * 16 if number in BAD else f"prompt {number}"[::-1][:16])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "job"
    path.mkdir()
    (tmp_path / "in.jsonl").write_bytes(rows())
    return path


def options_in(folder: Path, **fields: bool) -> JobOptions:
    return JobOptions(input=folder.parent / "in.jsonl", output=folder / "out.jsonl", model="m", **fields)


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


def test_a_job_that_stops_again_as_it_goes_on(folder: Path) -> None:
    options = options_in(folder)
    states = crash_everywhere(options, folder, Strict(), goes_on=True, bad=BAD)
    for state in random.Random(0).sample(states, 6):
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
