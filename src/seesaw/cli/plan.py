"""`seesaw plan`: which plan to run for a model, a node and a workload, what it will give, and why."""

from __future__ import annotations

import inspect
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from seesaw.cli import plan_options as opt
from seesaw.cli.failures import reported, say, set_up_logging
from seesaw.cli.subject import Subject, resolve, write

if TYPE_CHECKING:
    from seesaw.planning.candidates import Candidate, Ranking

STANDARD_OUTPUT = "-"


def plan(
    model: opt.Model,
    hardware: opt.Hardware = None,
    workload: opt.Workload = None,
    requests: opt.Requests = None,
    weights: opt.Weights = None,
    kv: opt.KV = None,
    seed: opt.Seed = 0,
    device_memory: opt.DeviceMemory = None,
    host_kv: opt.HostKV = None,
    max_running: opt.MaxRunning = None,
    chunk: opt.Chunk = None,
    top: opt.Top = 10,
    json: opt.Json = None,
    plot: opt.Plot = None,
    debug: opt.Debug = False,
) -> None:
    """Which plan to run for this model, node and workload, what it will give, and why.

    Layouts, chunks and batches are searched in closed form; the best plans are
    replayed request by request: the engine's own scheduler on a virtual clock.
    Neither weights nor the devices are needed.

    Exit code: 0 if a plan was found, 2 if none can be, or for unusable arguments.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        subject = resolve(
            model=model,
            hardware=hardware,
            workload=workload,
            requests=requests,
            weights=weights,
            kv=kv,
            seed=seed,
            arrivals=False,
            device_memory=device_memory,
            host_kv=host_kv,
        )
        with waiting("searching for plans"):
            ranking = search_plans(subject, max_running=max_running, chunk=chunk)
        job = workload if workload is not None and workload.lower().endswith(".jsonl") else "FILE"
        command = command_to_run(ranking.best, model, job)
        _report(ranking, subject, command, top=top, json=json, plot=plot)


def search_plans(subject: Subject, *, max_running: int | None, chunk: int | None) -> Ranking:
    """The planner's search; what is None is chosen."""
    from seesaw.planning.device_costs import costs_of
    from seesaw.planning.search import SearchOptions, search

    options = SearchOptions(
        device_memory=subject.device_memory,
        host_kv=subject.host_kv,
        chunk=chunk,
        max_running=max_running,
        costs=costs_of(subject.hardware.device),
    )
    return search(subject.model, subject.hardware, subject.workload, subject.dtype, options=options)


def _report(
    ranking: Ranking,
    subject: Subject,
    to_run: tuple[str, str],
    *,
    top: int,
    json: str | None,
    plot: Path | None,
) -> None:
    command, missing = to_run
    notes = [*subject.notes, *([missing] if missing else [])]
    if json is not None:
        from seesaw.report.planned_json import encoded, ranking_entry

        text = encoded(ranking_entry(ranking, profile=subject.profile, command=command, notes=notes))
        if json == STANDARD_OUTPUT:
            typer.echo(text, nl=False)
        else:
            write(Path(json), text, "--json")
            say(f"json: {json}")
    if plot is not None:
        from seesaw.report.plot import page

        write(plot, page(ranking, profile=subject.profile, notes=notes), "--plot")
        say(f"plot: {plot}")
    if json != STANDARD_OUTPUT:
        from seesaw.report.ranking import show_ranking
        from seesaw.report.text import console

        show_ranking(ranking, console(), profile=subject.profile, command=command, notes=notes, top=top)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


# ---- the command to run it --------------------------------------------------------------------------------


def command_to_run(candidate: Candidate, model: str, job: str) -> tuple[str, str]:
    """The `seesaw run` of a replayed candidate, and what that command has no option for ("" if nothing)."""
    from seesaw.cli.run import run

    known = inspect.signature(run).parameters
    directory = model if Path(model).is_dir() else f"path/to/{model.rpartition('/')[2]}"
    words = ["seesaw", "run", "--model", directory, "--input", job]
    missing = []
    for name, value in _settings(candidate).items():
        if name in known:
            words += [f"--{name.replace('_', '-')}", value]
        else:
            missing.append(f"{name}={value}")
    note = f"`seesaw run` has no option for {', '.join(missing)}, which was replayed" if missing else ""
    return shlex.join(words), note


def _settings(candidate: Candidate) -> dict[str, str]:
    """Options of the engine, as far as they are not what it does by itself."""
    setup, limits = candidate.setup, candidate.limits
    assert setup is not None, f"{candidate.name} was not worked out"
    settings = {
        "plan": candidate.name,
        "ranks": str(candidate.plan.world),
        "chunk": str(setup.scheduler.max_batch_tokens),
        "device_memory": _size_text(limits.device_memory),
        "host_kv": _size_text(limits.host_kv),
    }
    if limits.policy is not None:
        settings["policy"] = limits.policy
    if candidate.plan.reshards:
        settings["transition"] = setup.memory.mode
    if limits.max_running != type(limits).__dataclass_fields__["max_running"].default:
        settings["max_running"] = str(limits.max_running)
    if limits.micro_batches is not None:
        settings["micro_batches"] = str(limits.micro_batches)
    if limits.stages is not None:
        settings["stages"] = str(tuple(tuple(map(len, sharding.stages)) for sharding in setup.shardings))
    return settings


def _size_text(count: int) -> str:
    """Bytes as an option takes them, rounded down to a hundredth of a unit."""
    unit, name = (1 << 30, "GiB") if count >= 1 << 30 else (1 << 20, "MiB")
    return f"{math.floor(count / unit * 100) / 100:g}{name}"
