"""`seesaw run`: a job file through a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from seesaw.cli import run_options as opt
from seesaw.cli.failures import reported, say, set_up_logging
from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan
from seesaw.core.units import parse_bytes

if TYPE_CHECKING:
    from seesaw.jobs.base import JobEngine, JobOptions, JobSummary


def run(
    model: opt.Model,
    input: opt.Input,
    output: opt.Output = None,
    errors: opt.Errors = None,
    limit: opt.Limit = None,
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
    trace: opt.Trace = None,
    metrics_port: opt.MetricsPort = None,
    metrics_host: opt.MetricsHost = "127.0.0.1",
    debug: opt.Debug = False,
) -> None:
    """Run every row of a job file; each becomes one line of the output or of the error file.

    Exit code: 0 if all rows were answered, 1 if some failed, 2 for unusable arguments, 3 if interrupted.
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
            "trace": trace,
        }
    job = JobOptions(
        input=input,
        output=output,
        errors=errors,
        model=model,
        served_model_name=served_model_name,
        limit=limit,
    )
    raise typer.Exit(_run(job, engine_options, (metrics_host, metrics_port), debug=debug))


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


def _run(
    job: JobOptions, engine_options: dict[str, Any], metrics_at: tuple[str, int | None], *, debug: bool
) -> int:
    """Run the job and print its summary; returns the exit code. Metrics are served at (host, port)."""
    from seesaw.cli.observe import metrics_server, watching
    from seesaw.cli.progress import showing
    from seesaw.jobs.runner import check_files, run_job
    from seesaw.jobs.writer import part_path

    with reported(debug=debug) as command:
        check_files(job)
        if engine_options["plan"] != "auto":
            Plan.parse(engine_options["plan"])
        if engine_options["trace"] is not None:
            from seesaw.recording.trace import check_trace

            check_trace(engine_options["trace"])
        with metrics_server(*metrics_at) as metrics, open_engine(job.model, engine_options) as engine:
            command.started = True
            command.hint = f"what was answered so far is in {part_path(job.output_path)}"
            with showing() as show, watching(engine, job, engine_options, metrics) as watch:
                summary = run_job(engine, job, on_progress=watch.noting(show))
                watch.ended(summary)
            _print_summary(summary, record=watch.directory)
    return summary.exit_code


def _print_summary(summary: JobSummary, *, record: Path | None) -> None:
    from seesaw.report.summary import format_summary

    files = [("output", summary.output)]
    if summary.errors is not None:
        files.append(("errors", summary.errors))
    if record is not None:
        files.append(("run record", record))
    typer.echo(
        format_summary(
            summary.stats,
            rows_answered=summary.rows_answered,
            rows_failed=summary.rows_failed,
            failures=summary.failures,
            elapsed_seconds=summary.elapsed_seconds,
            files=files,
        )
    )
    if summary.interrupted:
        say("interrupted; what was answered so far is in the files above")
