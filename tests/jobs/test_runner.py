"""Files of a job: names, what stands where and when, interruptions and failures."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, pairwise
from operator import length_hint
from pathlib import Path

import pytest

from seesaw.core.errors import EngineError, JobError, WorkerError
from seesaw.core.request import Request, RequestOutput
from seesaw.jobs import runner
from seesaw.jobs.base import JobOptions, JobProgress
from seesaw.jobs.encoding.pool import Batch, EncoderPool
from seesaw.jobs.files import check_files
from seesaw.jobs.resume import open_job
from seesaw.jobs.runner import run_job
from seesaw.text import Tokenizer
from tests.jobs.contract import read
from tests.jobs.echo_engine import WINDOW, EchoEngine
from tests.test_text import save

BAD = b'{"id": "bad", "prompt": ""}\n'


def good(count: int) -> bytes:
    return b"".join(b'{"id": "r%d", "prompt": "p%d"}\n' % (i, i) for i in range(count))


@pytest.fixture
def job(tmp_path: Path) -> JobOptions:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(good(20))
    return JobOptions(input=source, model="m")


MANIFEST = "prompts.output.jsonl.manifest.json"
JOURNAL = "prompts.output.jsonl.journal"


def files(job: JobOptions) -> set[str]:
    return {p.name for p in job.inputs[0].parent.iterdir()} - {job.inputs[0].name}


def test_names_and_no_error_file_without_errors(job: JobOptions) -> None:
    summary = run_job(EchoEngine(), job)
    assert files(job) == {"prompts.output.jsonl", MANIFEST}
    assert (summary.rows, summary.rows_answered, summary.exit_code) == (20, 20, 0)
    assert summary.output == job.output_path
    assert summary.errors is None
    assert len({line["id"] for line in read(job.output_path)}) == 20


def test_an_error_file_of_an_earlier_job_goes(job: JobOptions) -> None:
    job.input.write_bytes(good(3) + BAD)
    assert run_job(EchoEngine(), job).errors == job.errors_path
    assert files(job) == {"prompts.output.jsonl", "prompts.output.errors.jsonl", MANIFEST, JOURNAL}
    job.input.write_bytes(good(5))
    run_job(EchoEngine(), replace(job, force=True))
    assert files(job) == {"prompts.output.jsonl", MANIFEST}
    assert len(read(job.output_path)) == 5


def test_empty_files_and_files_of_errors(job: JobOptions) -> None:
    job.input.write_bytes(b"")
    assert run_job(EchoEngine(), job).exit_code == 0
    assert job.output_path.read_bytes() == b""
    job.input.write_bytes(BAD)
    summary = run_job(EchoEngine(), replace(job, force=True))
    assert (summary.rows_answered, summary.rows_failed, summary.exit_code) == (0, 1, 1)
    assert job.output_path.read_bytes() == b""


def test_limit_counts_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n" + BAD + b"\n" + good(5))
    summary = run_job(EchoEngine(), JobOptions(input=source, model="m", limit=3))
    assert (summary.rows_answered, summary.rows_failed) == (2, 1)


def test_after_an_interruption_what_was_answered_stays(job: JobOptions) -> None:
    job.output_path.write_text("of an earlier job\n")
    job.input.write_bytes(BAD + good(20))
    summary = run_job(EchoEngine(fail_after=6), replace(job, force=True))
    assert summary.interrupted
    assert (summary.exit_code, summary.rows_answered, summary.rows_failed) == (3, 6, 1)
    assert job.output_path.read_text() == "of an earlier job\n"
    assert summary.output.name == "prompts.output.jsonl.part"
    assert summary.errors is not None
    assert len(read(summary.output)) == 6
    assert len(read(summary.errors)) == 1
    again = EchoEngine()
    summary = run_job(again, job)
    assert (summary.exit_code, summary.rows_before, len(again.requests)) == (1, 7, 14)
    assert files(job) == {"prompts.output.jsonl", "prompts.output.errors.jsonl", MANIFEST, JOURNAL}
    assert len({line["custom_id"] for line in read(job.output_path)}) == len(read(job.output_path)) == 20


def test_a_failing_engine_leaves_what_was_answered(job: JobOptions) -> None:
    engine = EchoEngine(fail_after=6)
    engine.error = WorkerError("rank 1 died", rank=1, phase="decode")
    with pytest.raises(WorkerError, match="rank 1"):
        run_job(engine, job)
    assert files(job) == {"prompts.output.jsonl.part", MANIFEST, JOURNAL}
    assert len(read(job.output_path.with_name("prompts.output.jsonl.part"))) == 6


@pytest.mark.parametrize("fault", ["twice", "never"])
def test_an_engine_that_loses_or_doubles_rows_is_noticed(fault: str, job: JobOptions) -> None:
    class Faulty(EchoEngine):
        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            for i, output in enumerate(super().run(requests)):
                if not (i == 5 and fault == "never"):
                    yield output
                if i == 5 and fault == "twice":
                    yield output

    with pytest.raises(EngineError, match="twice" if fault == "twice" else "without an answer to 1 rows"):
        run_job(Faulty(), job)


def test_results_stand_in_the_part_file_before_the_end(job: JobOptions) -> None:
    part = job.output_path.with_name("prompts.output.jsonl.part")

    class Slow(EchoEngine):
        seen = 0

        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            for i, output in enumerate(super().run(requests)):
                deadline = time.monotonic() + 20
                while i == 10 and self.seen < 10 and time.monotonic() < deadline:
                    time.sleep(0.02)
                    self.seen = len(part.read_bytes().splitlines())
                yield output

    engine = Slow()
    run_job(engine, job)
    assert engine.seen == 10


def test_rows_may_be_pulled_from_another_thread(job: JobOptions) -> None:
    class Threaded(EchoEngine):
        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            taken: list[Request] = []
            puller = threading.Thread(target=lambda: taken.extend(requests))
            puller.start()
            puller.join()
            yield from super().run(iter(taken))

    job.input.write_bytes((good(200) + BAD).replace(b'"r', b'"x'))
    summary = run_job(Threaded(), job)
    assert (summary.rows_answered, summary.rows_failed) == (200, 1)


def test_progress_comes_from_the_side_and_ends_with_the_totals(job: JobOptions) -> None:
    class Slow(EchoEngine):
        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            for output in super().run(requests):
                time.sleep(0.01)
                yield output

    seen: list[JobProgress] = []

    def take(progress: JobProgress) -> None:
        seen.append(progress)
        raise ValueError("a display that fails ends no job")

    options = JobOptions(input=job.input, model="m", progress_seconds=0.02, limit=15)
    assert run_job(Slow(), options, on_progress=take).exit_code == 0
    assert len(seen) > 3
    assert (seen[-1].rows_answered, seen[-1].rows_total) == (15, 15)
    assert all(a.rows_answered <= b.rows_answered for a, b in pairwise(seen))
    assert not [t for t in threading.enumerate() if t.name.startswith("seesaw-")]


def test_memory_of_rows_in_flight_is_bounded(job: JobOptions) -> None:
    job.input.write_bytes(good(500))
    engine = EchoEngine()
    run_job(engine, job)
    assert engine.held <= WINDOW


def test_prompts_of_a_long_job_go_through_the_encoder_processes(
    job: JobOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "tokeniser", "byte-level")
    tokenizer = Tokenizer.load(tmp_path / "tokeniser")
    sent: list[str] = []
    start, submit = EncoderPool.start, EncoderPool.submit

    def start_and_wait(pool: EncoderPool) -> None:
        start(pool)
        while not pool.ready:
            pool.pump(None)

    def submit_and_note(pool: EncoderPool, batch: Batch) -> None:
        sent.extend(slot.row.id for slot in batch.of)
        submit(pool, batch)

    monkeypatch.setattr(runner, "POOL_FROM_ROWS", 10)
    monkeypatch.setattr(EncoderPool, "start", start_and_wait)
    monkeypatch.setattr(EncoderPool, "submit", submit_and_note)
    job.input.write_bytes(good(60) + BAD)
    engine = EchoEngine()
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    summary = run_job(engine, job)
    assert (summary.rows_answered, summary.rows_failed) == (60, 1)
    assert sent == [f"r{i}" for i in range(60 - len(sent), 60)]
    assert len(sent) == 60 - 10  # the row that starts the pool is the tenth, and is made here
    assert [r.id for r in engine.requests] == [f"r{i}" for i in range(60)]
    assert [r.prompt_token_ids for r in engine.requests] == [
        tuple(tokenizer.encode(f"p{i}")) for i in range(60)
    ]


def test_the_collector_is_as_it_was_after_a_job(job: JobOptions) -> None:
    class Curious(EchoEngine):
        frozen = 0

        def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
            self.frozen = gc.get_freeze_count()
            yield from super().run(requests)

    before = gc.get_threshold()
    engine = Curious()
    run_job(engine, job)
    assert engine.frozen > 1000
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        run_job(EchoEngine(), replace(job, force=True))
        assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.1)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    "row",
    [
        b'{"id": "r%d", "prompt": "a"}',
        b'{"id": "r%d", "prompt": ""}',
        b'{"id": "r%d", "prompt": "a", "nonsense": 1}',
        b'{"id": "r%d", "messages": [{"a": 1}]}',
        b'{"id": "r%d", "prompt": "' + b"x" * 300 + b'"}',
        b'{"id": "r%d", ',
        b'{"id": "r1", "prompt": "%d"}',
    ],
)
def test_rows_go_without_the_garbage_collector(row: bytes, job: JobOptions) -> None:
    job.input.write_bytes(b"".join(row % i + b"\n" for i in range(500)))
    gc.collect()
    gc.disable()
    try:
        run_job(EchoEngine(), job)
        assert gc.collect() < 400
    finally:
        gc.enable()


def test_two_jobs_cannot_write_one_file(job: JobOptions) -> None:
    with open_job(job) as opened, open_job(job) as late:
        opened.start()
        with pytest.raises(JobError, match="another job"):
            late.start()
        with pytest.raises(JobError, match="another job"):
            run_job(EchoEngine(), job)
    assert run_job(EchoEngine(), job).exit_code == 0


def test_unusable_files(job: JobOptions, tmp_path: Path) -> None:
    source = job.input
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    cases = [
        (JobOptions(input=tmp_path / "none.jsonl", model="m"), "No such file"),
        (JobOptions(input=tmp_path, model="m"), "is a directory"),
        (JobOptions(input=source, output=link, model="m"), "output and input are the same"),
        (JobOptions(input=source, errors=source, model="m"), "errors and input are the same"),
        (
            JobOptions(input=source, output=tmp_path / "o", errors=tmp_path / "o", model="m"),
            "errors and output",
        ),
        (JobOptions(input=source, output=tmp_path / "no" / "o", model="m"), "does not exist"),
        (JobOptions(input=source, output=tmp_path, model="m"), "is a directory"),
    ]
    before = sorted(os.listdir(tmp_path))
    for options, said in cases:
        with pytest.raises(JobError, match=said):
            check_files(options)
    assert sorted(os.listdir(tmp_path)) == before


def test_input_may_be_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=lambda: pipe.write_bytes(good(9)))
    feeder.start()
    summary = run_job(EchoEngine(), JobOptions(input=pipe, output=tmp_path / "out.jsonl", model="m"))
    feeder.join()
    assert summary.rows_answered == 9


class Looking(EchoEngine):
    """Looks ahead by 4 rows, and notes how many it is told that are left."""

    left = -1

    def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
        ahead = list(islice(requests, 4))
        self.left = length_hint(requests, -1)
        return super().run(chain(ahead, requests))


@pytest.mark.parametrize(("limit", "left"), [(None, 96), (40, 36), (4, 0)])
def test_the_engine_is_told_about_how_many_rows_are_left(
    limit: int | None, left: int, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(b'{"id": "%03d", "prompt": "abc"}\n' % i for i in range(100)))
    engine = Looking()
    summary = run_job(engine, JobOptions(input=source, model="m", limit=limit))
    assert engine.left == left and summary.rows_answered == (limit or 100)
