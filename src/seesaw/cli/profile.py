"""`seesaw profile`: measure the box at hand, for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seesaw.cli.failures import reported, say, set_up_logging
from seesaw.cli.run_options import Debug
from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.core.hardware import HardwareSpec
    from seesaw.core.node import Place
    from seesaw.device.gpus import Gpu

Ranks = Annotated[
    int | None,
    typer.Option(
        help="Ranks to measure; by default one for each GPU or, on CPUs, for each core, at most 8; with --node one "
        "for each place.",
        min=1,
        max=64,
        metavar="N",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="What ranks compute on: cuda (NVIDIA GPUs, a rank on each), or cpu; auto is cuda where there are "
        "GPUs.",
        metavar="KIND",
    ),
]
NodeFile = Annotated[
    str | None,
    typer.Option(
        "--node",
        help="Node file that places the ranks in network namespaces, control groups and cores.",
        envvar="SEESAW_NODE",
        metavar="FILE",
    ),
]
DTypes = Annotated[
    list[str],
    typer.Option(
        "--dtype",
        help="Type to measure operators in: bfloat16, float32 or float16; several with commas between.",
        metavar="TYPES",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Where the profile goes; by default $SEESAW_PROFILE or the cache folder; the planner looks there.",
        metavar="FILE",
    ),
]
Threads = Annotated[int, typer.Option(help="Threads of a rank.", min=1, metavar="N")]

GPU_OPERANDS = 2 << 30
"""Bytes that a rank on a GPU cuts operands from: KV of 256 sequences of 1,024 tokens in float32."""
GPU_BESIDE = 5 << 30
"""Bytes that it takes besides at most: CUDA itself, communicators, weights that change, results."""
_GPU_PASSES = 3
"""How often all is measured: GPUs have no neighbours, and a pass takes longer to prepare than to measure."""


def profile(
    ranks: Ranks = None,
    device: Device = "auto",
    node: NodeFile = None,
    dtype: DTypes = ["bfloat16", "float32"],  # noqa: B006  typer reads it only
    output: Output = None,
    threads_per_rank: Threads = 1,
    debug: Debug = False,
) -> None:
    """Measure this box, its CPUs or its GPUs: matrix products, attention, links, copies and overheads, with all ranks
    at work.

    Takes one to two minutes, in which nothing else should run. The planner prefers the profile to its catalogue.

    Exit code: 0 if the profile was written, 1 if a rank failed, 2 for unusable arguments, 3 if interrupted.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        from seesaw.planning.profiles import default_path, save_profile

        path = output or default_path()
        started = time.monotonic()
        spec = _measure(_subject(ranks, device, node, threads_per_rank), _dtypes(dtype), threads_per_rank)
        save_profile(path, spec)
        _show(spec)
        say(f"measured in {time.monotonic() - started:.0f} s; profile: {path}")


def _dtypes(texts: list[str]) -> list[str]:
    from seesaw.core.model_spec import DTYPE_BYTES

    wanted = list(dict.fromkeys(word for text in texts for word in text.replace(",", " ").split()))
    for word in wanted:
        if word not in DTYPE_BYTES:
            raise ConfigError(f"--dtype {word!r}: choose from {', '.join(DTYPE_BYTES)}")
    if not wanted:
        raise ConfigError("--dtype: name at least one type")
    return wanted


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is measured."""

    places: list[Place]
    device: str
    name: str
    memory: int
    """Bytes of each rank."""


def _subject(ranks: int | None, device: str, node: str | None, threads: int) -> _Subject:
    """Raises `ConfigError` for ranks that have no place or no GPU."""
    from seesaw.core.devices import device_kind
    from seesaw.core.node import load_node, places_on_cores
    from seesaw.device.gpus import choose_kind, default_ranks, require_cuda_build, visible_gpus

    device = choose_kind(device)
    gpus: list[Gpu] = []
    if device_kind(device).numbered:
        require_cuda_build()
        gpus = visible_gpus()
    if node is None:
        places = places_on_cores(ranks or default_ranks(device, threads=threads, gpus=gpus), threads)
    else:
        places = load_node(node).ranks
        if ranks is not None and ranks > len(places):
            raise ConfigError(f"--ranks {ranks}: node file {node} has places for {len(places)}")
        places = places[:ranks]
    if gpus:
        return _on_gpus(places, device, gpus)
    return _on_host(places, device)


def _on_host(places: list[Place], device: str) -> _Subject:
    import psutil

    from seesaw.bench.machine import machine

    return _Subject(places, device, machine()["processor"], psutil.virtual_memory().total // len(places))


def _on_gpus(places: list[Place], device: str, gpus: list[Gpu]) -> _Subject:
    """A rank on each: sharing one would measure the sharing."""
    from seesaw.core.units import format_bytes

    numbers = [rank if place.device is None else place.device for rank, place in enumerate(places)]
    if max(numbers) >= len(gpus) or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"seesaw profile: {len(places)} ranks, each on a GPU of its own, and {len(gpus)} visible; use --ranks "
            f"{len(gpus)}, or fewer"
        )
    for number in numbers:
        if gpus[number].free < GPU_OPERANDS + GPU_BESIDE:
            raise ConfigError(
                f"seesaw profile: {format_bytes(gpus[number].free)} are free on GPU {number} ({gpus[number].name}), "
                f"{format_bytes(GPU_OPERANDS + GPU_BESIDE)} are needed; end what else runs there"
            )
    used = [gpus[number] for number in numbers]
    return _Subject(places, device, used[0].name, min(gpu.total for gpu in used))


def _measure(subject: _Subject, dtypes: list[str], threads: int) -> HardwareSpec:
    from seesaw.core.devices import device_kind
    from seesaw.profiling.fit import Box
    from seesaw.profiling.measure import Effort
    from seesaw.profiling.measure import profile as measure
    from seesaw.profiling.node import NodeOptions

    options, effort = NodeOptions(device=subject.device, threads=threads), Effort()
    if not device_kind(subject.device).on_host:
        options, effort = replace(options, memory=GPU_OPERANDS), replace(effort, passes=_GPU_PASSES)
    box = Box(name=subject.name, memory=subject.memory)
    with _bar() as progress:
        return measure(subject.places, dtypes, box, options, effort=effort, progress=progress)


def _show(spec: HardwareSpec) -> None:
    from rich.console import Console

    from seesaw.cli.profile_tables import tables

    console = Console(width=100)
    for table in tables(spec):
        console.print(table)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=32),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting the ranks", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
