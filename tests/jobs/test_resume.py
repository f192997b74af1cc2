"""What the same command, and another one, may do with the files of a job."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from operator import length_hint
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from seesaw.core.errors import JobError, JobFilesError
from seesaw.core.request import Request, RequestOutput
from seesaw.jobs.base import JobOptions
from seesaw.jobs.disk import JobFiles
from seesaw.jobs.manifest import Manifest, read_manifest
from seesaw.jobs.resume import open_job
from seesaw.jobs.runner import run_job
from tests.jobs.contract import read
from tests.jobs.crash_disk import LazyDisk
from tests.jobs.echo_engine import EchoEngine
from tests.jobs.small_job import BAD, ROWS, Strict, check, committed, make_folder, options_in, rows, run


@pytest.fixture
def job(tmp_path: Path) -> JobOptions:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"a": 1}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return replace(options_in(make_folder(tmp_path)), model=str(model), settings={"seed": 0, "dtype": "auto"})


def files_of(job: JobOptions) -> JobFiles:
    return JobFiles(job.output_path, job.errors_path)


def manifest_of(job: JobOptions) -> Manifest:
    manifest = read_manifest(files_of(job).manifest)
    assert manifest is not None
    return manifest


def source(job: JobOptions) -> Path:
    return job.inputs[0]


# ---- the manifest -----------------------------------------------------------------------------------------


def test_the_manifest_tells_the_story(job: JobOptions) -> None:
    run(job, Strict(fail_after=6), LazyDisk())
    manifest = manifest_of(job)
    assert (manifest.state, manifest.rows_answered) == ("running", 5)
    before = len(committed(files_of(job)))
    assert manifest.rows_failed == before - 5 > 0
    run(job, Strict(), LazyDisk())
    manifest = manifest_of(job)
    assert (manifest.state, manifest.rows_answered) == ("complete", ROWS - len(BAD))
    assert manifest.failures == {"context_length_exceeded": len(BAD)}
    assert (manifest.output, manifest.errors) == ("out.jsonl", "out.errors.jsonl")
    assert manifest.output_bytes == job.output_path.stat().st_size
    assert manifest.errors_bytes == job.errors_path.stat().st_size
    first, second = manifest.sessions
    assert (first.plan, first.rows_before, second.rows_before) == ("P2->T2", 0, before)
    assert first.seconds is not None and first.started <= second.started
    assert {mark.name for mark in manifest.fingerprint.model} == {
        "config.json",
        "chat_template.jinja",
        "model.safetensors",
    }


def test_a_manifest_that_cannot_be_read(job: JobOptions) -> None:
    run(job, Strict(fail_after=6), LazyDisk())
    path = files_of(job).manifest
    whole = path.read_bytes()
    for broken in (b"", whole[:40], b"[]", whole.replace(b'"running"', b'"walking"')):
        path.write_bytes(broken)
        with pytest.raises(
            JobFilesError, match=r"is not a manifest that this version.*--force to start again"
        ):
            open_job(job)
    newer = msgspec.json.decode(whole) | {"format": 9}
    path.write_bytes(msgspec.json.encode(newer))
    with pytest.raises(JobFilesError, match="has format 9"):
        open_job(job)
    run(replace(job, force=True), Strict(), LazyDisk())
    check(job, BAD)


# ---- changed arguments ------------------------------------------------------------------------------------


def change_config(job: JobOptions) -> JobOptions:
    (Path(job.model) / "config.json").write_text('{"a": 2}')
    return job


def change_weights(job: JobOptions) -> JobOptions:
    with (Path(job.model) / "model.safetensors").open("ab") as file:
        file.write(bytes(100))
    return job


def change_template(job: JobOptions) -> JobOptions:
    (Path(job.model) / "chat_template.jinja").unlink()
    return job


def change_input(job: JobOptions) -> JobOptions:
    source(job).write_bytes(rows() + b'{"prompt": "more"}\n')
    return job


CHANGES = [
    (change_config, "the model's config.json has another content"),
    (change_weights, r"the model's model.safetensors has 188 B, had 88 B|has \d+ B"),
    (change_template, "the model has no more chat_template.jinja"),
    (change_input, r"the input in.jsonl has [\d.,]+ \w+, had [\d.,]+"),
    (lambda job: replace(job, settings={"seed": 5, "dtype": "auto"}), "--seed is 5, was 0"),
    (lambda job: replace(job, limit=7), "--limit is 7, was not given"),
    (lambda job: replace(job, served_model_name="m"), "--served-model-name is m, was not given"),
    (lambda job: replace(job, errors=job.output_path.with_name("e")), "--errors is e, was out.errors.jsonl"),
]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(("change", "said"), CHANGES, ids=lambda c: getattr(c, "__name__", ""))
def test_a_change_is_refused_and_named(complete: bool, change, said: str, job: JobOptions) -> None:  # type: ignore[no-untyped-def]
    run(job, Strict(fail_after=None if complete else 6), LazyDisk())
    before = {path.name: path.read_bytes() for path in job.output_path.parent.iterdir()}
    changed = change(job)
    with pytest.raises(JobFilesError, match=said) as caught:
        open_job(changed)
    assert "choose another --output, or --force to" in str(caught.value)
    assert {path.name: path.read_bytes() for path in job.output_path.parent.iterdir()} == before
    engine = Strict()
    summary = run(replace(changed, force=True), engine, LazyDisk())
    assert not summary.interrupted
    assert (summary.rows_before == 0) == complete


def test_what_answers_do_not_depend_on_may_change(job: JobOptions) -> None:
    run(job, Strict(fail_after=6), LazyDisk())
    run(replace(job, ordered=True, progress_seconds=9.0), Strict(), LazyDisk())
    check(job, BAD, ordered=True)


def test_a_changed_row_is_named(job: JobOptions, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a large file, where no fingerprint looks."""
    source(job).write_bytes(
        rows() + b"".join(b'{"id": "f%05d", "prompt": "%s"}\n' % (i, b"x" * 150) for i in range(1500))
    )
    run(job, Strict(fail_after=900), LazyDisk())
    content = source(job).read_bytes()
    at = content.index(b"f00500")
    source(job).write_bytes(content[:at] + b"g" + content[at + 1 :])
    with pytest.raises(
        JobFilesError, match=r"line 525: the row 'g00500' is not what it was when it was done"
    ):
        run(job, Strict(), LazyDisk())
    assert run(replace(job, force=True), Strict(), LazyDisk()).rows == ROWS + 1500
    assert "1 rows changed since they were done" in caplog.text


def test_a_vanished_input(job: JobOptions) -> None:
    run(job, Strict(fail_after=6), LazyDisk())
    content = source(job).read_bytes()
    source(job).unlink()
    with pytest.raises(JobError, match=r"in.jsonl: cannot be read \(No such file"):
        run(job, Strict(), LazyDisk())
    source(job).write_bytes(content)
    assert run(job, Strict(), LazyDisk()).rows_before >= 6
    check(job, BAD)


def test_the_model_keeps_the_names_it_was_called_by(job: JobOptions) -> None:
    """The alias was settled by a row that is passed over now."""
    names = ["gpt-a"] * 12 + ["gpt-b"] * 4
    source(job).write_text(
        "".join(json.dumps({"id": f"r{i}", "prompt": "a", "model": n}) + "\n" for i, n in enumerate(names))
    )
    assert run(job, EchoEngine(fail_after=4), LazyDisk()).interrupted
    assert run(job, EchoEngine(), LazyDisk()).failures == {"model_not_found": 4}


# ---- files that are there ---------------------------------------------------------------------------------


def test_a_complete_job_runs_nothing(job: JobOptions) -> None:
    run(job, Strict(), LazyDisk())
    before = {path.name: path.read_bytes() for path in job.output_path.parent.iterdir()}
    engine = Strict()
    summary = run_job(engine, job)
    assert not engine.requests
    assert (summary.exit_code, summary.rows, summary.rows_before) == (1, ROWS, ROWS)
    assert {path.name: path.read_bytes() for path in job.output_path.parent.iterdir()} == before


def test_an_output_that_was_cut_or_removed_after_the_end(job: JobOptions) -> None:
    run(job, Strict(), LazyDisk())
    os.truncate(job.output_path, 100)
    with pytest.raises(JobFilesError, match="has 100 bytes, had"):
        open_job(job)
    job.output_path.unlink()
    assert len(run(job, engine := Strict(), LazyDisk()).failures) == 1
    assert len(engine.requests) == ROWS
    check(job, BAD)


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl", "out.jsonl.part"])
def test_files_of_others_are_not_replaced(name: str, job: JobOptions) -> None:
    path = job.output_path.with_name(name)
    path.write_text("precious\n")
    with pytest.raises(
        JobFilesError, match=rf"{re.escape(str(path))}: is there already.*--force to replace it"
    ):
        run(job, Strict(), LazyDisk())
    assert path.read_text() == "precious\n"
    run(replace(job, force=True), Strict(), LazyDisk())
    check(job, BAD)


def test_without_its_journal_a_job_starts_again_if_told_to(job: JobOptions) -> None:
    run(job, Strict(fail_after=6), LazyDisk())
    files_of(job).journal.unlink()
    with pytest.raises(JobFilesError, match="is gone, so that nothing tells which rows are done"):
        open_job(job)
    assert run(replace(job, force=True), Strict(), LazyDisk()).rows_before == 0
    check(job, BAD)


def test_without_its_journal_failed_rows_are_not_known(job: JobOptions) -> None:
    run(job, Strict(), LazyDisk())
    files_of(job).journal.unlink()
    with pytest.raises(JobFilesError, match="nothing tells which rows failed"):
        open_job(replace(job, retry_errors=True))


def test_an_error_file_in_another_folder(job: JobOptions, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    job = replace(job, errors=other / "failed.jsonl")
    run(job, Strict(fail_after=12), LazyDisk())
    assert [path.name for path in other.iterdir()] == ["failed.jsonl.part"]
    run(job, Strict(), LazyDisk())
    check(job, BAD)
    run(replace(job, retry_errors=True), Strict(strict=False), LazyDisk())
    check(job, set())
    assert not list(other.iterdir())


def test_nothing_to_retry(job: JobOptions) -> None:
    run(job, Strict(strict=False), LazyDisk())
    engine = Strict()
    assert run(replace(job, retry_errors=True), engine, LazyDisk()).exit_code == 0
    assert not engine.requests


# ---- disks ------------------------------------------------------------------------------------------------


class FullDisk(LazyDisk):
    """Has room for so many bytes; of what does not fit, a part is written."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        fits = min(len(data), self.room)
        self.room -= fits
        super().write(descriptor, bytes(data[:fits]), offset)
        if fits < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_disk_that_is_full_at_any_moment(ordered: bool, job: JobOptions) -> None:
    job = replace(job, ordered=ordered)
    room, done = 0, False
    while not done:
        for path in job.output_path.parent.iterdir():
            path.unlink()
        try:
            run(job, Strict(), FullDisk(room))
            done = True
        except JobError as error:
            assert re.search(r"cannot be written \(No space left on device\); make room there$", str(error))
        safe = committed(files_of(job))
        engine = Strict()
        run(job, engine, LazyDisk())
        check(job, BAD, ordered=ordered)
        assert not {int(r.id[1:]) + 1 for r in engine.requests} & set(safe)
        room += 977
    assert room > 9 * 977


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_real_disk_that_is_full_and_one_that_is_read_only(job: JobOptions, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    job = replace(job, output=disk / "out.jsonl")
    try:
        with pytest.raises(JobError, match=r"cannot be written \(No space left on device\)"):
            run_job(Strict(), job)
        safe = committed(files_of(job))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(JobError, match="cannot be written"):
            run_job(Strict(), job)
        subprocess.run(["mount", "-o", "remount,rw,size=1m", str(disk)], check=True)
        engine = Strict()
        run_job(engine, job)
        check(job, BAD)
        assert not {int(r.id[1:]) + 1 for r in engine.requests} & set(safe)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- standard output --------------------------------------------------------------------------------------


def test_standard_output(job: JobOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=taken))
    before = sorted(tmp_path.rglob("*"))
    summary = run_job(Strict(), replace(job, output=Path("-")))
    assert (summary.rows, summary.exit_code, summary.errors) == (ROWS, 1, None)
    assert {json.loads(line)["custom_id"] for line in taken.getvalue().splitlines()} == {
        f"r{i}" for i in range(ROWS)
    }
    assert sorted(tmp_path.rglob("*")) == before
    taken.truncate(0)
    taken.seek(0)
    run_job(Strict(), replace(job, output=Path("-"), errors=job.errors_path))
    assert len(taken.getvalue().splitlines()) == ROWS - len(BAD)
    assert len(read(job.errors_path)) == len(BAD)


@pytest.mark.parametrize("option", ["ordered", "retry_errors"])
def test_what_standard_output_cannot_do(option: str, job: JobOptions) -> None:
    with pytest.raises(JobError, match=f"--{option.replace('_', '-')} needs an output file"):
        run_job(Strict(), replace(job, output=Path("-"), **{option: True}))


def test_the_engine_is_told_how_many_rows_are_left_to_run(job: JobOptions) -> None:
    class Looking(Strict):
        left = -1

        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            first = next(requests)
            self.left = length_hint(requests, -1)
            return super().run(chain([first], requests))

    source(job).write_bytes(b"".join(b'{"id": "%03d", "prompt": "abc"}\n' % i for i in range(100)))
    run(job, Strict(fail_after=60), LazyDisk())
    engine = Looking()
    assert run(job, engine, LazyDisk()).rows == 100
    assert engine.left == 39
