"""`seesaw run`: a job file through a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
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
    from seesaw.options import PreflightMode

_OF_THE_ENGINE = (
    *(
        "plan",
        "ranks",
        "device",
        "ranks_per_gpu",
        "dtype",
        "load_format",
        "policy",
        "max_model_len",
        "seed",
        "chunk",
        "max_running",
    ),
    *("transition", "threads_per_rank", "on_rank_loss", "preflight", "trace"),
)
"""Options that the engine takes as they are."""
_OF_THE_JOB = (
    *("output", "errors", "model", "served_model_name", "prompt_column", "id_column"),
    *("limit", "ordered", "retry_errors", "force", "max_tokens"),
)
"""Options that the job takes as they are."""
_OF_THE_ANSWERS = (
    *("dtype", "load_format", "seed", "max_model_len"),
    *("generation_config", "max_tokens", "temperature"),
)
"""Options that a job cannot go on under when they change."""


def run(
    model: opt.Model,
    input: opt.Input,
    output: opt.Output = None,
    errors: opt.Errors = None,
    prompt_column: opt.PromptColumn = None,
    id_column: opt.IdColumn = None,
    keep_column: opt.KeepColumn = None,
    limit: opt.Limit = None,
    ordered: opt.Ordered = False,
    retry_errors: opt.RetryErrors = False,
    force: opt.Force = False,
    dtype: opt.DType = "auto",
    load_format: opt.LoadFormat = "auto",
    served_model_name: opt.ServedModelName = None,
    generation_config: opt.GenerationConfig = "auto",
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    plan: opt.PlanText = "auto",
    ranks: opt.Ranks = None,
    device: opt.Device = "auto",
    ranks_per_gpu: opt.RanksPerGpu = 1,
    policy: opt.Policy = None,
    transition: opt.Transition = "auto",
    chunk: opt.Chunk = None,
    max_running: opt.MaxRunning = None,
    threads_per_rank: opt.ThreadsPerRank = 1,
    on_rank_loss: opt.OnRankLoss = "continue",
    sync_loop: opt.SyncLoop = False,
    seed: opt.Seed = 0,
    device_memory: opt.DeviceMemory = None,
    host_kv: opt.HostKV = None,
    max_model_len: opt.MaxModelLen = None,
    preflight: opt.Preflight = "auto",
    trace: opt.Trace = None,
    metrics_port: opt.MetricsPort = None,
    metrics_host: opt.MetricsHost = "127.0.0.1",
    debug: opt.Debug = False,
) -> None:
    """Run every row of a job file; each becomes one line of the output or of the error file.

    What is answered is safe within a second or two. The same command goes on where an earlier one was stopped.

    Exit code: 0 if all rows were answered, 1 if some failed, 2 for unusable arguments, 3 if the job was stopped on
    the way.
    """
    given = dict(locals())
    set_up_logging(debug=debug)
    with reported(debug=debug):
        job, engine_options = _read_options(given)
    raise typer.Exit(_run(job, engine_options, (metrics_host, metrics_port), debug=debug))


def _read_options(given: dict[str, Any]) -> tuple[JobOptions, dict[str, Any]]:
    """What the command was given, as options of the job and of the engine. Raises a `ConfigError`."""
    from seesaw.defaults import default_sampling
    from seesaw.device.gpus import choose_kind
    from seesaw.hub import find_model
    from seesaw.jobs.base import JobOptions
    from seesaw.jobs.sources.open import find_inputs

    engine_options = {name: given[name] for name in _OF_THE_ENGINE} | {
        "device": choose_kind(given["device"]),
        "device_memory": _size("--device-memory", given["device_memory"]),
        "host_kv": _size("--host-kv", given["host_kv"]),
        "overlap": not given["sync_loop"],
    }
    folder = find_model(given["model"])
    asked = {} if given["temperature"] is None else {"temperature": given["temperature"]}
    job = JobOptions(
        input=find_inputs(given["input"]),
        model_folder=folder,
        sampling_defaults=default_sampling(folder, given["generation_config"], asked),
        keep_columns=tuple(given["keep_column"] or ()),
        settings={name.replace("_", "-"): given[name] for name in _OF_THE_ANSWERS},
        **{name: given[name] for name in _OF_THE_JOB},
    )
    return job, engine_options


def open_engine(model: str, options: dict[str, Any]) -> AbstractContextManager[JobEngine]:
    """The engine of a job. Importing it brings torch, which other processes load in the meantime."""
    from seesaw.execution.fork_server import fork_server
    from seesaw.preflight.gate import start_early

    fork_server()
    start_early(options["preflight"])
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
    options: JobOptions,
    engine_options: dict[str, Any],
    metrics_at: tuple[str, int | None],
    *,
    debug: bool,
) -> int:
    """Run the job and print its summary; returns the exit code. Metrics are served at (host, port)."""
    from seesaw.cli.observe import metrics_server, watching
    from seesaw.cli.progress import showing
    from seesaw.jobs.resume import open_job
    from seesaw.jobs.runner import run_opened
    from seesaw.jobs.sources.open import check_formats

    with reported(debug=debug) as command:
        check_formats(options)
        if engine_options["plan"] != "auto":
            Plan.parse(engine_options["plan"])
        if engine_options["trace"] is not None:
            from seesaw.recording.trace import check_trace

            check_trace(engine_options["trace"])
        folder = str(options.model_folder or options.model)
        with open_job(options) as job:
            if job.complete:
                return _say_complete(job)
            engine_options["preflight"] = _check_before(job, engine_options)
            with metrics_server(*metrics_at) as metrics, open_engine(folder, engine_options) as engine:
                command.failure = FAILED if options.streamed else INTERRUPTED
                try:
                    with showing() as show, watching(engine, job, engine_options, metrics) as watch:
                        summary = run_opened(engine, job, on_progress=watch.noting(show))
                        watch.ended(summary)
                except BaseException:
                    command.hint = _hint(job)
                    raise
        _print_summary(summary, job, record=watch.directory)
    return summary.exit_code


def _check_before(job: OpenJob, options: dict[str, Any]) -> PreflightMode:
    """Check the folders of the job's files; returns what the engine is to check. Raises a `ConfigError`."""
    from seesaw.device.gpus import default_ranks
    from seesaw.preflight.gate import check_job_files, choose_mode

    if options["preflight"] == "off":
        return "off"
    if options["plan"] != "auto":
        ranks = Plan.parse(options["plan"]).world
    else:
        ranks = options["ranks"] or default_ranks(
            options["device"], threads=options["threads_per_rank"], ranks_per_gpu=options["ranks_per_gpu"]
        )
    asked, part = job.options, job.files.answers_part
    if not asked.streamed:
        written = part.stat().st_size if part.is_file() else 0
        check_job_files(
            asked.inputs, asked.output_path, asked.errors_path, limit=asked.limit, written=written
        )
    return choose_mode(options["preflight"], ranks=ranks, inputs=asked.inputs, limit=asked.limit)


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


def _print_summary(summary: JobSummary, job: OpenJob, *, record: Path | None) -> None:
    from seesaw.report.summary import format_summary

    streamed = job.options.streamed
    files = [] if streamed else [("output", summary.output)]
    if summary.errors is not None:
        files.append(("errors", summary.errors))
    if record is not None:
        files.append(("run record", record))
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
