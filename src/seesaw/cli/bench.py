"""`seesaw bench`: plans of Seesaw and other engines, compared on workloads in alternating runs."""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from seesaw.cli import bench_options as opt
from seesaw.cli.failures import FAILED, INTERRUPTED, reported, say, set_up_logging
from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.bench.contestant import Contestant
    from seesaw.bench.output import Context
    from seesaw.bench.runner import BenchOptions, BenchResult
    from seesaw.bench.workloads import Workload

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def bench(
    shape: opt.Shape = "270m",
    workload: opt.Workload = ["short"],  # noqa: B006  typer reads it only
    scale: opt.Scale = 1.0,
    plans: opt.Plans = ["P2->T2 T2 P2 D2"],  # noqa: B006
    peers: opt.Peers = None,
    rounds: opt.Rounds = 5,
    reference: opt.Reference = None,
    dtype: opt.DType = "bfloat16",
    device_memory: opt.DeviceMemory = None,
    host_kv: opt.HostKV = None,
    node: opt.Node = None,
    vllm_python: opt.VllmPython = None,
    seed: opt.Seed = 0,
    fresh: opt.Fresh = False,
    floor: opt.Floor = True,
    profile: opt.Profile = False,
    json: opt.Json = None,
    record: opt.Record = None,
    results: opt.Results = Path("benchmarks/results"),
    note: opt.Note = None,
    logs: opt.Logs = None,
    debug: opt.Debug = False,
) -> None:
    """Compare plans and engines on a model of random weights; each is explained by its floor.

    A contestant is a plan, with :POLICY or @option=value,... or both behind it, such as 'P2->T2', 'T2:chunked' or
    'T2@chunk=512,max_running=64'; or auto, for what the planner chooses; or vllm:TP1, vllm:TP2, vllm:PP2 with options
    likewise. Each is a process of its own, started once and stopped while another runs. One that fails is reported
    and does not end the others.

    Exit code: 0 if every contestant ran, 1 if one failed, 2 for unusable arguments, 3 if interrupted.
    """
    from seesaw.bench.runner import BenchOptions

    set_up_logging(debug=debug)
    options = BenchOptions(
        rounds=rounds,
        dtype=dtype,
        seed=seed,
        fresh=fresh,
        floor=floor,
        profile=profile,
        node=node,
        device_memory=device_memory,
        host_kv=host_kv,
    )
    with reported(debug=debug), ExitStack() as stack:
        if record is not None and not _NAME.fullmatch(record):
            raise ConfigError(f"--record {record!r}: use letters, digits, '.', '_' and '-' only")
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seesaw-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        jobs = _workloads(workload, scale)
        everyone = _contestants([*plans, *(peers or [])], vllm_python, reference)
        found = _run(shape, jobs, everyone, options, folder)
        context = _context(shape, reference, note)
        _report(found, context, json, record, results)
    if found.interrupted:
        say("interrupted; what was measured until then is above")
        raise typer.Exit(INTERRUPTED)
    failed = any(entry.error is not None for result in found.results for entry in result.entries)
    raise typer.Exit(FAILED if failed else 0)


def _workloads(texts: list[str], scale: float) -> list[Workload]:
    from seesaw.bench.workloads import parse_workload

    jobs = [parse_workload(word, scale) for text in texts for word in text.split()]
    if not jobs:
        raise ConfigError("--workload: name at least one")
    return list({job.name: job for job in jobs}.values())


def _contestants(texts: list[str], vllm_python: Path | None, reference: str | None) -> list[Contestant]:
    from seesaw.bench.contestant import parse_contestants

    found = [one for text in texts for one in parse_contestants(text, vllm_python)]
    everyone = list({one.name: one for one in found}.values())
    if not everyone:
        raise ConfigError("--plans: name at least one contestant")
    if reference is not None and reference not in {one.name for one in everyone}:
        names = ", ".join(one.name for one in everyone)
        raise ConfigError(f"--reference {reference!r}: is not among the contestants {names}")
    return everyone


def _run(
    shape: str, jobs: list[Workload], everyone: list[Contestant], options: BenchOptions, folder: Path
) -> BenchResult:
    from seesaw.bench.runner import Bench
    from seesaw.bench.shapes import model_directory
    from seesaw.models.hf_config import load_spec

    model = model_directory(shape, folder / "model")
    return Bench(model, load_spec(str(model)), options, folder).run(jobs, everyone)


def _context(shape: str, reference: str | None, note: str | None) -> Context:
    from seesaw.bench.machine import command_line, machine, versions
    from seesaw.bench.output import Context

    return Context(
        shape=shape,
        command=command_line(sys.argv[1:]),
        machine=machine(),
        versions=versions(),
        day=date.today(),
        reference=reference,
        note=note,
    )


def _report(
    found: BenchResult, context: Context, json: Path | None, record: str | None, results: Path
) -> None:
    from rich.console import Console

    from seesaw.bench.output import show, write_json, write_record

    console = Console()
    width = console.width if console.is_terminal else max(console.width, 140)
    show(found, context.reference, Console(width=width))
    if json is not None:
        write_json(json, found, context)
    if record is not None:
        say(f"record: {write_record(results, record, found, context)}")
