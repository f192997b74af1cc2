"""`open_job`: where a job stands by its files, and what a command may do with it."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np

from seesaw.core.errors import JobError, JobFilesError
from seesaw.jobs.base import JobOptions
from seesaw.jobs.check import check_lines, within
from seesaw.jobs.disk import DISK, Disk, JobFiles, size_of, writing
from seesaw.jobs.done import DoneRows, failures_by_code
from seesaw.jobs.files import check_files
from seesaw.jobs.fingerprint import Fingerprint, differences, take_fingerprint
from seesaw.jobs.finish import clear_up, finish_files
from seesaw.jobs.journal import Damage, Header, Kind, Records, Replay, replay
from seesaw.jobs.manifest import Manifest, Session, now, read_manifest, write_manifest
from seesaw.jobs.sinks.open import is_plain
from seesaw.jobs.store import (
    JobStore,
    LineStore,
    StreamStore,
    continue_store,
    create_store,
    open_journal,
    rewrite_journal,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenJob:
    """A job as a command finds it. Its files are locked if it was begun before.

    `start` gives the store for its lines, `finish` makes the output of them; in between, `pause` notes how far
    it is. Nothing is created before `start`. Methods raise `JobError`.
    """

    options: JobOptions
    disk: Disk = DISK
    manifest: Manifest | None = None
    """None while the job has not begun, and for standard output."""
    done: DoneRows = field(default_factory=DoneRows)
    """Rows of earlier sessions."""
    failures: Counter[str] = field(default_factory=Counter)
    """Their failures by code."""
    safe: int = 0
    """Rows that no crash can lose: those found, and when the session has ended, its own as well."""
    _fingerprint: Fingerprint | None = None
    _found: Replay | None = None
    _journal: int | None = None
    """Its descriptor, while no store has it."""
    _store: LineStore | None = None
    _started: float = field(default_factory=time.monotonic)

    @property
    def files(self) -> JobFiles:
        """Its files."""
        return JobFiles(self.options.output_path, self.options.errors_path)

    @property
    def errors_streamed(self) -> bool:
        """Whether failed rows go to standard output."""
        return self.options.streamed and self.options.errors is None

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do."""
        return self.manifest is not None and self.manifest.state == "complete"

    def start(self) -> LineStore:
        """Begin, or go on: the store for the lines of rows that are not done."""
        if self.options.streamed:
            self._store = StreamStore(self.options.errors)
            return self._store
        if self.manifest is None:
            self._store = self._begin()
        else:
            assert self._found is not None and self._journal is not None
            self._store = continue_store(self.files, self._found, self._journal, self.disk)
            self.manifest.state = "running"
        assert self.manifest is not None and self._fingerprint is not None
        self._journal = self._found = None
        self.manifest.fingerprint = self._fingerprint
        self.manifest.sessions.append(Session(started=now(), rows_before=len(self.done)))
        self._write_manifest()
        return self._store

    def _begin(self) -> JobStore:
        job = secrets.token_bytes(8)
        files, fingerprint = self.files, self._fingerprint
        assert fingerprint is not None
        if self._journal is None:
            self._journal = open_journal(files.journal, self.disk, create=True)
        store = create_store(files, Header(int.from_bytes(job, "little")), self._journal, self.disk)
        self.manifest = Manifest(
            job=f"{int.from_bytes(job, 'little'):016x}",
            output=files.output.name,
            errors=files.errors.name,
            fingerprint=fingerprint,
            started=now(),
        )
        return store

    def pause(self, plan: str, answered: int, failures: Counter[str]) -> None:
        """Note where the job stands as its session ends."""
        self._note(plan, answered, failures)
        if self.manifest is not None:
            with suppress(JobError):  # it says no more than the journal; a full disk has been reported
                self._write_manifest()

    def _note(self, plan: str, answered: int, failures: Counter[str]) -> None:
        if self.manifest is None:
            return
        manifest = self.manifest
        manifest.rows_answered, manifest.rows_failed = answered, failures.total()
        manifest.failures = dict(failures.most_common())
        manifest.ended = now()
        session = manifest.sessions[-1]
        session.seconds, session.plan = round(time.monotonic() - self._started, 3), plan

    def finish(self, plan: str, answered: int, failures: Counter[str]) -> None:
        """All rows are done: give the files their names. The store must have been synced."""
        if self.manifest is None:
            return
        assert isinstance(self._store, JobStore)
        self._note(plan, answered, failures)
        self.manifest.state, self.manifest.ordered = "finishing", self.options.ordered
        self._write_manifest()
        self.complete_files(replay(self.files.journal))

    def complete_files(self, found: Replay) -> None:
        """From the state `finishing` to `complete`."""
        manifest, files, disk = self.manifest, self.files, self.disk
        assert manifest is not None
        finish_files(files, found, ordered=manifest.ordered, disk=disk)
        manifest.state, manifest.round = "complete", found.header.round
        manifest.output_bytes, manifest.errors_bytes = size_of(files.output), size_of(files.errors)
        self._write_manifest()
        clear_up(files, disk, failed=bool(manifest.rows_failed))

    def _write_manifest(self) -> None:
        assert self.manifest is not None
        write_manifest(self.files.manifest, self.manifest, self.disk)

    def close(self) -> None:
        """Let go of the files. May be called twice."""
        if self._store is not None:
            self._store.close()
        if self._journal is not None:
            self.disk.close(self._journal)
            self._journal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_job(options: JobOptions, *, disk: Disk = DISK) -> OpenJob:
    """Look at the files of a job, and put right what a crash left. Changes nothing where no job was begun.

    Raises `JobError` for files that cannot be used, `JobFilesError` where they belong to something else.
    """
    check_files(options)
    job = OpenJob(options, disk)
    if options.streamed:
        return job
    job._fingerprint = take_fingerprint(options)
    try:
        _Opening(job, options).settle()
    except BaseException:
        job.close()
        raise
    return job


class _Opening:
    """Brings a job from its files to where it can start, or be found complete."""

    def __init__(self, job: OpenJob, options: JobOptions) -> None:
        self.job, self.options = job, options
        self.files, self.disk, self.force = job.files, job.disk, options.force

    def settle(self) -> None:
        try:
            manifest = read_manifest(self.files.manifest)
        except JobFilesError:
            if not self.force:
                raise
            manifest = None
        if manifest is None:
            self._refuse_strangers()
            return
        self.job.manifest = manifest
        self._open_journal(manifest)
        if self.job.manifest is None:
            return
        ended_now = manifest.state == "finishing" and self.job._found is not None
        if ended_now:
            assert self.job._found is not None
            self.job.complete_files(self.job._found)
            self._reopen_journal()
        if manifest.state == "complete":
            self._settle_complete(
                manifest, again=self.force and not ended_now and not self.options.retry_errors
            )
        else:
            self._settle_running(manifest)

    def _refuse_strangers(self) -> None:
        """Files that would be overwritten and were not made by a job of ours."""
        files = self.files
        for path in (files.output, files.errors, files.answers_part, files.errors_part):
            if size_of(path) and not self.force:
                raise JobFilesError(
                    f"{path}: is there already, and no {files.manifest.name} beside it tells of a job that could go "
                    "on; choose another --output, or --force to replace it"
                )

    # ---- the journal --------------------------------------------------------------------------------------

    def _open_journal(self, manifest: Manifest) -> None:
        """Lock and read the journal of `manifest`, if it is there. Whole it must be where it will be needed."""
        path = self.files.journal
        if not path.exists():
            return
        self.job._journal = open_journal(path, self.disk)
        needed = manifest.state != "complete" or self.options.retry_errors
        try:
            found = replay(path)
            if found.header.job != int(manifest.job, 16):
                raise Damage(f"{path}: belongs to another job than {self.files.manifest.name}")
        except Damage as damage:
            if needed and not self.force:
                raise self._damaged(damage, "to start again from the first row") from damage
            if needed:
                logger.warning("%s; the job starts again from its first row", damage)
                self._start_again()
            return
        if needed:
            self._tell_of_damage(found)
        self.job._found = found
        if found.header.round > manifest.round and manifest.state == "complete":
            manifest.state = "running"  # it died as failed rows were about to run again

    def _tell_of_damage(self, found: Replay) -> None:
        if found.damage:
            if not self.force:
                raise self._damaged(found.damage, f"to go on from the {len(found.rows()):,} rows before it")
            logger.warning("%s; the rows before it are kept, the others run again", found.damage)
        elif found.torn:
            logger.info(
                "%s: the last %d bytes, from byte %d on, were not committed; their rows run again",
                self.files.journal,
                found.torn,
                found.size,
            )

    def _damaged(self, what: Damage | str, force: str) -> JobFilesError:
        return JobFilesError(f"{what}; choose another --output, or --force {force}")

    def _reopen_journal(self) -> None:
        """After the end of a job, whose journal may be gone."""
        if self.job._journal is not None and not self.files.journal.exists():
            self.disk.close(self.job._journal)
            self.job._journal = self.job._found = None

    # ---- a job that is complete ---------------------------------------------------------------------------

    def _settle_complete(self, manifest: Manifest, *, again: bool) -> None:
        files = self.files
        if again:
            logger.info("%s: is complete; every row runs again", files.output)
            self._start_again()
            return
        size = size_of(files.output)
        if size is None:
            logger.info("%s: is complete, but gone; every row runs again", files.output)
            self._start_again()
            return
        self._refuse_changes(manifest, "to run every row again")
        if size != manifest.output_bytes:
            raise JobFilesError(
                f"{files.output}: has {size:,} bytes, had {manifest.output_bytes:,} when the job was complete; "
                "remove it or --force to run every row again"
            )
        if self.options.retry_errors and manifest.rows_failed:
            self._retry_complete(manifest)
        else:
            clear_up(files, self.disk, failed=bool(manifest.rows_failed))

    def _start_again(self) -> None:
        self.job.manifest = self.job._found = None

    def _retry_complete(self, manifest: Manifest) -> None:
        """Copy the answers into `OUTPUT.part`; a new journal of them alone is the step that counts."""
        files, found = self.files, self.job._found
        if found is None or self.job._journal is None:
            raise JobFilesError(
                f"{files.journal}: is gone, so that nothing tells which rows failed; --force runs every row again"
            )
        rows = found.rows()
        rows = rows[rows["kind"] == Kind.ANSWER]
        if is_plain(files.output):
            rows = _in_file_order(rows, ordered=manifest.ordered)
            self._copy_answers()
        self._new_round(rows)
        manifest.state = "running"
        self._take_rows()

    def _copy_answers(self) -> None:
        source, target = self.files.output, self.files.answers_part
        with writing(target), source.open("rb") as file:
            descriptor = self.disk.open(target, create=True)
            try:
                self.disk.truncate(descriptor, 0)
                offset = 0
                while chunk := file.read(1 << 24):
                    self.disk.write(descriptor, chunk, offset)
                    offset += len(chunk)
                self.disk.sync(descriptor)
            finally:
                self.disk.close(descriptor)

    def _new_round(self, rows: Records) -> None:
        assert self.job._found is not None
        header = self.job._found.header
        self._rewrite(replace(header, round=header.round + 1), rows)

    def _rewrite(self, header: Header, rows: Records) -> None:
        assert self.job._journal is not None
        self.job._journal = rewrite_journal(self.files, header, rows, self.job._journal, self.disk)
        self.job._found = replay(self.files.journal)

    # ---- a job that is not --------------------------------------------------------------------------------

    def _settle_running(self, manifest: Manifest) -> None:
        files, found = self.files, self.job._found
        if found is None:
            if not self.force:
                raise self._damaged(
                    f"{files.journal}: is gone, so that nothing tells which rows are done",
                    "to start again from the first row",
                )
            self._start_again()
            return
        self._refuse_changes(manifest, "to go on regardless, with the rows that are done as they are")
        self._repair(found)
        if self.options.retry_errors and not found.header.round:
            rows = self._rows()
            failed = int((rows["kind"] == Kind.ERROR).sum())
            if failed:
                logger.info("%s: %d failed rows run again", files.output, failed)
                self._new_round(rows[rows["kind"] == Kind.ANSWER])
        self._take_rows()

    def _rows(self) -> Records:
        assert self.job._found is not None
        return self.job._found.rows()

    def _repair(self, found: Replay) -> None:
        """Bring journal and lines together where lines are missing."""
        check = check_lines(self.files, found)
        if check.damage and not self.force:
            raise self._damaged(check.damage, "to run it and the rows after it again")
        if check.ends == found.ends:
            return
        rows = found.rows()
        kept = within(rows, check.ends)
        logger.warning(
            "%s: the lines of %d rows are gone that the journal tells of; they run again",
            self.files.answers_part if check.ends.answers < found.ends.answers else self.files.errors_part,
            len(rows) - len(kept),
        )
        self._rewrite(found.header, kept)

    def _take_rows(self) -> None:
        job = self.job
        assert job._found is not None
        for group in job._found.groups():
            job.done.add(group.rows)
        if job.done.failed:
            ends = job._found.ends
            job.failures.update(failures_by_code(self.files.errors_part, ends.errors))
        job.safe = len(job.done)
        if job.safe:
            logger.info("%s: %d rows were done before; the job goes on", self.files.output, job.safe)

    def _refuse_changes(self, manifest: Manifest, force: str) -> None:
        assert self.job._fingerprint is not None
        changes = differences(self.job._fingerprint, manifest.fingerprint)
        if not changes:
            return
        text = "; ".join(changes)
        if not self.force:
            raise JobFilesError(
                f"{self.files.output}: belongs to a job that was asked for something else: {text}. Ask for the same, "
                f"choose another --output, or --force {force}"
            )
        logger.warning("%s: goes on although %s", self.files.output, text)


def _in_file_order(rows: Records, *, ordered: bool) -> Records:
    """Rows as their lines stand in a finished output, with the offsets they have there."""
    if ordered:
        rows = rows[np.argsort(rows["a"], kind="stable")]
        rows["b"] = np.cumsum(rows["c"], dtype=np.uint64) - rows["c"]
    return rows
