"""The journal and the lines it tells of: cut anywhere, changed anywhere."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest

from seesaw.core.errors import JobFilesError
from seesaw.jobs.base import JobOptions
from seesaw.jobs.disk import DISK, JobFiles
from seesaw.jobs.journal import RECORD_BYTES, Damage, Ends, Header, Kind, replay, start_journal
from seesaw.jobs.resume import open_job
from tests.jobs.crash_disk import LazyDisk, State
from tests.jobs.small_job import BAD, ROWS, Strict, check, committed, lay_out, make_folder, options_in, run

ANSWERS, ERRORS, JOURNAL = "out.jsonl.part", "out.errors.jsonl.part", "out.jsonl.journal"


@pytest.fixture
def job(tmp_path: Path) -> JobOptions:
    return options_in(make_folder(tmp_path))


def stopped(job: JobOptions, after: int = 18) -> State:
    """The files of a job that was interrupted."""
    assert run(job, Strict(fail_after=after), LazyDisk()).interrupted
    return {path.name: path.read_bytes() for path in job.output_path.parent.iterdir()}


def put(job: JobOptions, files: State, **changed: bytes) -> None:
    names = {"answers": ANSWERS, "errors": ERRORS, "journal": JOURNAL}
    lay_out(job.output_path.parent, {**files, **{names[what]: data for what, data in changed.items()}})


def go_on(job: JobOptions) -> set[int]:
    """Run to the end; the numbers of the rows that ran."""
    engine = Strict()
    run(job, engine, LazyDisk())
    check(job, BAD)
    return {int(request.id[1:]) + 1 for request in engine.requests}


def test_a_journal_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = start_journal(path, DISK.open(path, create=True), Header(77, 2))
    journal.commit(journal.row(Kind.ANSWER, 5, 0, 10, 1, 2), Ends(10, 0), 3)
    journal.commit(
        journal.row(Kind.ERROR, 2**40, 0, 7, 1, 2) + journal.row(Kind.ANSWER, 6, 10, 2**32 - 1, 4, 5),
        Ends(2**33, 7),
        6,
    )
    found = replay(path)
    assert (found.header, found.torn, found.damage) == (Header(77, 2), 0, "")
    assert found.rows()["a"].tolist() == [5, 2**40, 6]
    first, second = found.groups()
    assert (first.start, first.end, first.lines_crc) == (Ends(0, 0), Ends(10, 0), 3)
    assert (second.start, second.end, second.lines_crc) == (Ends(10, 0), Ends(2**33, 7), 6)
    assert found.size == path.stat().st_size == 6 * RECORD_BYTES


def test_a_group_of_another_job_does_not_count(tmp_path: Path) -> None:
    path, other = tmp_path / "journal", tmp_path / "other"
    for file, job in ((path, 1), (other, 2)):
        journal = start_journal(file, DISK.open(file, create=True), Header(job))
        journal.commit(journal.row(Kind.ANSWER, 5, 0, 10, 1, 2), Ends(10, 0), 3)
    path.write_bytes(path.read_bytes()[:RECORD_BYTES] + other.read_bytes()[RECORD_BYTES:])
    assert len(replay(path).rows()) == 0 and replay(path).torn == 2 * RECORD_BYTES


def test_the_journal_cut_at_every_byte(job: JobOptions) -> None:
    """What is cut off runs again, and the rest does not."""
    files = stopped(job)
    whole = files[JOURNAL]
    for size in range(RECORD_BYTES, len(whole), 13):
        put(job, files, journal=whole[:size])
        safe = committed(JobFiles(job.output_path, job.errors_path))
        assert not go_on(job) & set(safe)
    assert len(safe) > 10


def test_a_journal_without_a_header_is_named(job: JobOptions) -> None:
    files = stopped(job)
    for size in (0, 1, RECORD_BYTES - 1):
        put(job, files, journal=files[JOURNAL][:size])
        with pytest.raises(JobFilesError, match=r"header is damaged.*--force to start again"):
            open_job(job)
    assert go_on(replace(job, force=True)) == {n + 1 for n in range(ROWS)}


def test_the_journal_of_a_complete_job_matters_for_retries_alone(job: JobOptions) -> None:
    run(job, Strict(), LazyDisk())
    path = JobFiles(job.output_path, job.errors_path).journal
    whole = path.read_bytes()
    for at in (3, RECORD_BYTES + 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with open_job(job) as opened:
            assert opened.complete
        with pytest.raises(JobFilesError, match="damaged"):
            open_job(replace(job, retry_errors=True))


def test_every_flipped_byte_of_the_journal(job: JobOptions, caplog: pytest.LogCaptureFixture) -> None:
    """Found and named with its record; or, in the last group, taken for a torn one, which is said."""
    files = stopped(job)
    whole = files[JOURNAL]
    put(job, files)
    path = JobFiles(job.output_path, job.errors_path).journal
    last = RECORD_BYTES * (1 + replay(path).closings[-2])
    dice = random.Random(0)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        if at < RECORD_BYTES:
            with pytest.raises(Damage, match=r"record 0, byte 0|no journal that"):
                replay(path)
            continue
        found = replay(path)
        if at < last:
            record = at // RECORD_BYTES
            assert (
                f"{path}: record {record} (byte {record * RECORD_BYTES}) is damaged"
                in found.damage.replace(",", "")
            )
        else:
            assert (found.damage, found.size) == ("", last)
            assert found.torn == len(whole) - last
    with caplog.at_level(logging.INFO, logger="seesaw"):
        go_on(job)
    assert f"the last {len(whole) - last} bytes, from byte {last} on, were not committed" in caplog.text


def test_a_damaged_journal_goes_on_from_the_rows_before(job: JobOptions) -> None:
    files = stopped(job)
    put(job, files)
    path = JobFiles(job.output_path, job.errors_path).journal
    second = replay(path).closings[0] + 2
    flipped = bytearray(files[JOURNAL])
    flipped[second * RECORD_BYTES + 9] ^= 4
    put(job, files, journal=bytes(flipped))
    with pytest.raises(
        JobFilesError, match=rf"record {second} \(byte {second * 40}\) is damaged.*--force to go on"
    ):
        open_job(job)
    put(job, files, journal=bytes(flipped))
    kept = {int(n) for n in replay(path).rows()["a"]}
    assert len(kept) == 5
    assert go_on(replace(job, force=True)) == {n + 1 for n in range(ROWS)} - kept - {
        n + 1 for n in BAD & set()
    }


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_cut_at_every_byte_of_the_last_4_kib(
    step: int, job: JobOptions, caplog: pytest.LogCaptureFixture
) -> None:
    files = stopped(job)
    whole = files[ANSWERS]
    rows = [line.split(b'"custom_id":"r')[1].split(b'"')[0] for line in whole.splitlines()]
    for size in range(max(0, len(whole) - 4096), len(whole), step):
        put(job, files, answers=whole[:size])
        caplog.clear()
        ran = go_on(job)
        lost = whole.count(b"\n") - whole[:size].count(b"\n")
        gone = {int(name) + 1 for name in rows[len(rows) - lost :]}
        assert gone <= ran
        assert not ran & {int(name) + 1 for name in rows[: len(rows) - lost]}
        assert f"the lines of {lost} rows are gone that the journal tells of" in caplog.text


def test_errors_cut_or_gone(job: JobOptions) -> None:
    files = stopped(job)
    lines = files[ERRORS].count(b"\n")
    assert lines > 1
    for size in range(0, len(files[ERRORS]), 61):
        put(job, files, errors=files[ERRORS][:size])
        lost = lines - files[ERRORS][:size].count(b"\n")
        assert len(go_on(job) & {n + 1 for n in BAD}) == lost + len(BAD) - lines
    put(job, files)
    JobFiles(job.output_path, job.errors_path).errors_part.unlink()
    go_on(job)


@pytest.mark.parametrize("what", ["answers", "errors"])
def test_a_changed_line_is_named(what: str, job: JobOptions) -> None:
    files = stopped(job)
    name = {"answers": ANSWERS, "errors": ERRORS}[what]
    data = files[name]
    for at in range(0, len(data), 173):
        flipped = bytearray(data)
        flipped[at] ^= 1
        put(job, files, **{what: bytes(flipped)})
        start = data.rfind(b"\n", 0, at) + 1
        with pytest.raises(
            JobFilesError, match=rf"{name}: the line at byte {start:,} \(row \d+\) is not what was"
        ):
            open_job(job)
    assert go_on(replace(job, force=True))


def test_bytes_that_no_group_tells_of_are_cut_off(job: JobOptions) -> None:
    files = stopped(job)
    torn = files[JOURNAL][RECORD_BYTES:] * 3
    put(
        job,
        files,
        answers=files[ANSWERS] + b'{"torn',
        errors=files[ERRORS] + b"x" * 5000,
        journal=files[JOURNAL] + torn,
    )
    with open_job(job) as opened:
        opened.start()
    for name, content in files.items():
        if name in (ANSWERS, ERRORS, JOURNAL):
            assert (job.output_path.parent / name).read_bytes() == content
    go_on(job)


def test_a_hole_in_the_last_group(job: JobOptions) -> None:
    """A crash may leave the end of a write and not its beginning."""
    files = stopped(job)
    whole = bytearray(files[JOURNAL])
    put(job, files)
    closings = replay(JobFiles(job.output_path, job.errors_path).journal).closings
    first = RECORD_BYTES * (closings[-2] + 1)
    whole[first : first + RECORD_BYTES] = bytes(RECORD_BYTES)
    put(job, files, journal=bytes(whole))
    safe = committed(JobFiles(job.output_path, job.errors_path))
    assert len(safe) == closings[-2] - (len(closings) - 1)
    assert not go_on(job) & set(safe)
