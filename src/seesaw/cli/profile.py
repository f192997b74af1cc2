"""`seesaw profile`: measure the box at hand, for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seesaw.cli.failures import reported, say, set_up_logging
from seesaw.cli.run_options import Debug
from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.core.hardware import HardwareSpec
    from seesaw.core.node import Place

Ranks = Annotated[
    int | None,
    typer.Option(
        help="Ranks to measure; by default one for each core, at most 8, or for each place of --node.",
        min=1,
        max=64,
        metavar="N",
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


def profile(
    ranks: Ranks = None,
    node: NodeFile = None,
    dtype: DTypes = ["bfloat16", "float32"],  # noqa: B006  typer reads it only
    output: Output = None,
    threads_per_rank: Threads = 1,
    debug: Debug = False,
) -> None:
    """Measure this box: matrix products, attention, links, copies and overheads, with all ranks at work.

    Takes one to two minutes, in which nothing else should run. The planner prefers the profile to its catalogue.

    Exit code: 0 if the profile was written, 1 if a rank failed, 2 for unusable arguments, 3 if interrupted.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        from seesaw.planning.profiles import default_path, save_profile

        path = output or default_path()
        started = time.monotonic()
        spec = _measure(_places(ranks, node, threads_per_rank), _dtypes(dtype), threads_per_rank)
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


def _places(ranks: int | None, node: str | None, threads: int) -> list[Place]:
    from seesaw.core.node import load_node, places_on_cores

    if node is None:
        return places_on_cores(ranks or _default_ranks(threads), threads)
    places = load_node(node).ranks
    if ranks is not None and ranks > len(places):
        raise ConfigError(f"--ranks {ranks}: node file {node} has places for {len(places)}")
    return places[:ranks]


def _default_ranks(threads: int) -> int:
    import os

    return max(1, min(8, len(os.sched_getaffinity(0)) // threads))


def _measure(places: list[Place], dtypes: list[str], threads: int) -> HardwareSpec:
    import psutil

    from seesaw.bench.machine import machine
    from seesaw.profiling.fit import Box
    from seesaw.profiling.measure import Effort
    from seesaw.profiling.measure import profile as measure
    from seesaw.profiling.node import NodeOptions

    box = Box(name=machine()["processor"], memory=psutil.virtual_memory().total // len(places))
    with _bar() as progress:
        return measure(places, dtypes, box, NodeOptions(threads=threads), effort=Effort(), progress=progress)


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
