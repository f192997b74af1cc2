"""The end of a job whose output is of another format than lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions
from seesaw.jobs.disk import DISK
from seesaw.jobs.finish import CONVERTERS, finish
from tests.jobs.crash_disk import CrashDisk, LazyDisk
from tests.jobs.small_job import BAD, Strict, check, lay_out, make_folder, options_in, run


def write_backwards(lines: Iterator[bytes], path: Path) -> None:
    path.write_bytes(b"".join(line[-2::-1] + b"\n" for line in lines))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobOptions:
    """A job whose output is written backwards."""
    monkeypatch.setitem(CONVERTERS, ".back", write_backwards)
    job = options_in(make_folder(tmp_path))
    return replace(job, output=job.output_path.with_suffix(".back"))


def check_backwards(job: JobOptions, bad: set[int]) -> None:
    plain = replace(job, output=job.output_path.with_name("plain.jsonl"), errors=job.errors_path)
    plain.output_path.write_bytes(b"".join(line[-2::-1] + b"\n" for line in job.output_path.open("rb")))
    check(plain, bad, ordered=job.ordered)
    plain.output_path.unlink()


@pytest.mark.parametrize("ordered", [False, True])
def test_a_converted_output(ordered: bool, job: JobOptions) -> None:
    """Its lines stay while rows that failed may be run again; a crash anywhere loses nothing."""
    job = replace(job, ordered=ordered)
    folder, part = job.output_path.parent, job.output_path.with_name("out.back.part")
    disk = CrashDisk(folder)
    run(job, Strict(), disk)
    disk.release()
    check_backwards(job, BAD)
    assert part.exists()
    states = disk.states
    disk = CrashDisk(folder)
    engine = Strict(strict=False)
    run(replace(job, retry_errors=True), engine, disk)
    disk.release()
    assert len(engine.requests) == len(BAD)
    check_backwards(job, set())
    assert {path.name for path in folder.iterdir()} == {"out.back", "out.back.manifest.json"}
    for state in states:
        lay_out(folder, state)
        run(job, Strict(), LazyDisk())
        check_backwards(job, BAD)
    for state in disk.states:
        lay_out(folder, state)
        run(replace(job, retry_errors=True), Strict(strict=False), LazyDisk())
        check_backwards(job, set())


def test_a_converter_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(lines: Iterator[bytes], path: Path) -> None:
        path.write_bytes(next(lines))
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(CONVERTERS, ".bad", fail)
    target = tmp_path / "x.bad"
    target.write_text("before")
    with pytest.raises(JobError, match=r"x.bad: cannot be written \(No space left on device\)"):
        finish(iter([b"a\n"]), target, DISK)
    assert target.read_text() == "before"
