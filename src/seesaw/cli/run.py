"""`seesaw run`: a job file through a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import typer

from seesaw.cli import run_options as opt
from seesaw.cli.failures import FAILED, INTERRUPTED, reported, say, set_up_logging
from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan
from seesaw.core.units import parse_bytes

if TYPE_CHECKING:
    from seesaw.jobs.base import JobEngine, JobOptions, JobSummary
    from seesaw.jobs.resume import OpenJob


def run(
    model: opt.Model,
    input: opt.Input,
    output: opt.Output = None,
    errors: opt.Errors = None,
    limit: opt.Limit = None,
    ordered: opt.Ordered = False,
    retry_errors: opt.RetryErrors = False,
    force: opt.Force = False,
    dtype: opt.DType = "auto",
    load_format: opt.LoadFormat = "auto",
    served_model_name: opt.ServedModelName = None,
    plan: opt.PlanText = "auto",
    ranks: opt.Ranks = None,
    device: opt.Device = "cpu",
    policy: opt.Policy = None,
    transition: opt.Transition = "auto",
    chunk: opt.Chunk = None,
    max_running: opt.MaxRunning = None,
    threads_per_rank: opt.ThreadsPerRank = 1,
    sync_loop: opt.SyncLoop = False,
    seed: opt.Seed = 0,
    device_memory: opt.DeviceMemory = None,
    host_kv: opt.HostKV = None,
    max_model_len: opt.MaxModelLen = None,
    debug: opt.Debug = False,
) -> None:
    """Run every row of a job file; each becomes one line of the output or of the error file.

    What is answered is safe within a second or two. The same command goes on where an earlier one was stopped.

    Exit code: 0 if all rows were answered, 1 if some failed, 2 for unusable arguments, 3 if the job was stopped on
    the way.
    """
    from seesaw.jobs.base import JobOptions

    set_up_logging(debug=debug)
    with reported(debug=debug):
        engine_options = {
            "plan": plan,
            "ranks": ranks,
            "device": device,
            "device_memory": _size("--device-memory", device_memory),
            "host_kv": _size("--host-kv", host_kv),
            "dtype": dtype,
            "load_format": load_format,
            "policy": policy,
            "max_model_len": max_model_len,
            "seed": seed,
            "chunk": chunk,
            "max_running": max_running,
            "transition": transition,
            "overlap": not sync_loop,
            "threads_per_rank": threads_per_rank,
        }
    job = JobOptions(
        input=input,
        output=output,
        errors=errors,
        model=model,
        served_model_name=served_model_name,
        limit=limit,
        ordered=ordered,
        retry_errors=retry_errors,
        force=force,
        settings={
            "dtype": dtype,
            "load-format": load_format,
            "seed": seed,
            "max-model-len": max_model_len,
        },
    )
    raise typer.Exit(_run(job, engine_options, debug=debug))


def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
    """The engine of a job. Importing it brings torch."""
    from seesaw.llm import LLM

    return LLM(model, **options)


def _size(option: str, text: str | None) -> int | None:
    """Bytes of an option, or None. Raises `ConfigError` naming the option."""
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error


def _run(options: JobOptions, engine_options: dict[str, Any], *, debug: bool) -> int:
    """Run the job and print its summary; returns the exit code."""
    from seesaw.cli.progress import showing
    from seesaw.jobs.resume import open_job
    from seesaw.jobs.runner import run_opened

    with reported(debug=debug) as command:
        if engine_options["plan"] != "auto":
            Plan.parse(engine_options["plan"])
        with open_job(options) as job:
            if job.complete:
                return _say_complete(job)
            with open_engine(options.model, engine_options) as engine:
                command.failure = FAILED if options.streamed else INTERRUPTED
                try:
                    with showing() as show:
                        summary = run_opened(engine, job, on_progress=show)
                except BaseException:
                    command.hint = _hint(job)
                    raise
        _print_summary(summary, job)
    return summary.exit_code


def _say_complete(job: OpenJob) -> int:
    """One line for a job that was complete; returns its exit code."""
    manifest, options = job.manifest, job.options
    assert manifest is not None
    failed = f", {manifest.rows_failed:,} failed ({options.errors_path})" if manifest.rows_failed else ""
    retry = "; --retry-errors runs these again" if manifest.rows_failed and not options.retry_errors else ""
    say(f"{options.output_path}: complete, {manifest.rows_answered:,} rows answered{failed}{retry}")
    return manifest.exit_code


def _hint(job: OpenJob) -> str:
    """What became of the rows so far."""
    if job.options.streamed:
        return "answers that were not printed are lost; with an --output file they would not be"
    return f"{job.safe:,} rows are safe in {job.files.answers_part}; the same command goes on from there"


def _print_summary(summary: JobSummary, job: OpenJob) -> None:
    from seesaw.report.summary import format_summary

    streamed = job.options.streamed
    files = [] if streamed else [("output", summary.output)]
    if summary.errors is not None:
        files.append(("errors", summary.errors))
    typer.echo(
        format_summary(
            summary.stats,
            rows_answered=summary.rows_answered,
            rows_failed=summary.rows_failed,
            rows_before=summary.rows_before,
            failures=summary.failures,
            elapsed_seconds=summary.elapsed_seconds,
            files=files,
        ),
        err=streamed,
    )
    if summary.interrupted:
        say(f"interrupted; {_hint(job)}")
