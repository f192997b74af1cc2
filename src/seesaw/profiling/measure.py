"""Measures a node and makes a `HardwareSpec` of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import msgspec

from seesaw.core.hardware import HardwareSpec
from seesaw.core.node import Place
from seesaw.profiling.fit import Box, fit
from seesaw.profiling.node import Node, NodeOptions
from seesaw.profiling.tasks import Task, all_tasks, group_sizes

Progress = Callable[[int, int, str], None]
"""Told how many measurements are done, of how many, and which is next."""
_SLOW = 0.2
"""Seconds of an all-reduce or a hand-over beyond which no larger ones are measured: a line goes on from there."""
_LINKS = ("all_reduce", "send")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure: `seconds` each, all of it so many times over, of which the median counts.

    What slows a whole machine down, such as its neighbours in a data centre, comes and goes within seconds.
    """

    seconds: float = 0.03
    passes: int = 9


def profile(
    places: Sequence[Place],
    dtypes: Sequence[str],
    box: Box,
    options: NodeOptions,
    *,
    effort: Effort,
    progress: Progress,
    tasks: Sequence[Task] | None = None,
) -> HardwareSpec:
    """Measure a process in each place; `box` is what no measurement says. Tasks are all there are unless given.

    Raises `ConfigError` for a transport that cannot be had, `ContestantError` if a rank fails.
    """
    wanted = all_tasks(len(places), dtypes, options.device) if tasks is None else list(tasks)
    with Node(places, options, group_sizes(len(places))) as node:
        times = measure(node, wanted, effort, progress)
    found = fit(times, len(places), dtypes, options.device, box)
    return msgspec.structs.replace(found, partial_sums=node.partial_sums)


def measure(node: Node, tasks: Sequence[Task], effort: Effort, progress: Progress) -> dict[Task, float]:
    """Seconds of each task, the mean over its ranks. Without those that slow links would take too long for."""
    times: dict[Task, list[float]] = {}
    total, done = len(tasks) * effort.passes, 0
    for _ in range(effort.passes):
        slow: set[tuple[str, object]] = set()
        for task in tasks:
            progress(done, total, task.label)
            done += 1
            kind = (task.op, dict(task.arguments).get("size"))
            if kind in slow:
                continue
            seconds = _measure(node, task, effort.seconds)
            if task.op in _LINKS and seconds > _SLOW:
                slow.add(kind)
            times.setdefault(task, []).append(seconds)
    progress(total, total, "done")
    return {task: median(found) for task, found in times.items()}


def _measure(node: Node, task: Task, budget: float) -> float:
    if task.alone:
        return node.one(task.op, budget, **task.sent())
    values = [value for value in node.all(task.op, budget, **task.sent()) if value is not None]
    return fmean(values)
