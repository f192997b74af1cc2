"""A job of a few dozen rows on the echo engine, and what must have become of each row."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from seesaw.jobs.base import JobOptions, JobSummary
from seesaw.jobs.disk import Disk, JobFiles
from seesaw.jobs.journal import Damage, Kind, replay
from seesaw.jobs.manifest import read_manifest
from seesaw.jobs.resume import open_job
from seesaw.jobs.runner import complete_summary, run_opened
from seesaw.jobs.writer import SyncWindow
from tests.jobs.contract import read
from tests.jobs.crash_disk import State
from tests.jobs.echo_engine import EchoEngine

ROWS = 24
BAD = {3, 9, 10, 20}
"""Rows, from 0, that cannot be served."""
WINDOW = SyncWindow(rows=5, seconds=60)


class Strict(EchoEngine):
    """Refuses the bad rows, as long as it is `strict`."""

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


def make_folder(path: Path) -> Path:
    """A folder for the job's files, beside its input."""
    folder = path / "job"
    folder.mkdir()
    (path / "in.jsonl").write_bytes(rows())
    return folder


def options_in(folder: Path, **fields: bool) -> JobOptions:
    return JobOptions(input=folder.parent / "in.jsonl", output=folder / "out.jsonl", model="m", **fields)
