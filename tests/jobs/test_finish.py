"""The end of a job whose output is of another format than lines."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.errors import JobError
from seesaw.jobs.base import JobOptions
from seesaw.jobs.disk import DISK
from seesaw.jobs.finish import finish
from seesaw.jobs.sinks.packed import JsonlSink
from tests.jobs.crash_disk import CrashDisk, LazyDisk
from tests.jobs.small_job import BAD, Strict, check, lay_out, make_folder, options_in, run


@pytest.fixture
def job(tmp_path: Path) -> JobOptions:
    """A job whose output is compressed."""
    job = options_in(make_folder(tmp_path))
    return replace(job, output=job.output_path.with_name("out.jsonl.gz"))


def check_packed(job: JobOptions, bad: set[int]) -> None:
    plain = replace(job, output=job.output_path.with_name("plain.jsonl"), errors=job.errors_path)
    plain.output_path.write_bytes(gzip.decompress(job.output_path.read_bytes()))
    check(plain, bad, ordered=job.ordered)
    plain.output_path.unlink()


@pytest.mark.parametrize("ordered", [False, True])
def test_a_converted_output(ordered: bool, job: JobOptions) -> None:
    """Its lines stay while rows that failed may be run again; a crash anywhere loses nothing."""
    job = replace(job, ordered=ordered)
    folder, part = job.output_path.parent, job.output_path.with_name("out.jsonl.gz.part")
    disk = CrashDisk(folder)
    run(job, Strict(), disk)
    disk.release()
    check_packed(job, BAD)
    assert part.exists()
    states = disk.states
    disk = CrashDisk(folder)
    engine = Strict(strict=False)
    run(replace(job, retry_errors=True), engine, disk)
    disk.release()
    assert len(engine.requests) == len(BAD)
    check_packed(job, set())
    assert {path.name for path in folder.iterdir()} == {"out.jsonl.gz", "out.jsonl.gz.manifest.json"}
    for state in states:
        lay_out(folder, state)
        run(job, Strict(), LazyDisk())
        check_packed(job, BAD)
    for state in disk.states:
        lay_out(folder, state)
        run(replace(job, retry_errors=True), Strict(strict=False), LazyDisk())
        check_packed(job, set())


def test_a_sink_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: JsonlSink, line: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonlSink, "write", fail)
    target = tmp_path / "x.jsonl.zst"
    target.write_text("before")
    with pytest.raises(JobError, match=r"x.jsonl.zst: cannot be written \(No space left on device\)"):
        finish(iter([b"a\n"]), target, DISK)
    assert target.read_text() == "before"
