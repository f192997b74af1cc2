"""Jobs for the digital twin, as the studies beside this file need them: draw, rank, replay in full, write down."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from seesaw.bench.machine import versions
from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import DType
from seesaw.planning.candidates import Candidate, Ranking
from seesaw.planning.catalogue import hardware
from seesaw.planning.scoring import CHUNKS, SearchOptions
from seesaw.planning.search import search
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import PlannedModel, shape
from seesaw.planning.twin import Simulated, simulate
from seesaw.planning.workloads import Workload, workload
from seesaw.report.causes import Job, cause_seconds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPE: DType = "float16"
GIB = 1 << 30
MEMORY_SHARE = 0.9
"""Of a device's memory that weights, activations and KV may take: vLLM's default, and the paper's."""
HOPELESS = 1.4
"""Times the best estimate, from which on a plan is not replayed (`accuracy` in docs/paper-grid.md)."""
_LADDER = (128, *CHUNKS)
"""Chunks to vary a winner by: small ones suit static plans, so one more than searches try."""
NONE = "–"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A job on a node: what is planned for."""

    node: str
    """As the catalogue names it, without the number of ranks."""
    model: str
    ranks: int
    trace: str
    requests: int
    host_gib: float = 80.0
    """Host buffer for each device."""

    @property
    def gpu(self) -> str:
        """The device."""
        return self.node.partition("@")[0]


@dataclass(frozen=True, eq=False)
class Replay:
    """A plan that ran the whole job in the twin."""

    plan: Plan
    limits: Limits
    estimated: float | None
    """Seconds by the closed form; None if limits were changed since."""
    setup: Setup
    simulated: Simulated

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return self.simulated.seconds

    def described(self) -> dict[str, Any]:
        """For a record."""
        job = Job(str(self.plan), self.simulated)
        return {
            "plan": str(self.plan),
            "chunk": self.limits.chunk,
            "max_running": self.limits.max_running,
            "micro_batches": self.limits.micro_batches,
            "transition_mode": self.setup.memory.mode,
            "seconds": self.seconds,
            "estimated_seconds": self.estimated,
            "tokens_per_second": self.simulated.rate,
            "phases": {
                name: {"seconds": phase.seconds, "batch": phase.batch, "forwards": phase.forwards}
                for name, phase in self.simulated.phases.items()
            },
            "causes": cause_seconds(job),
            "transitions": self.simulated.transitions,
            "swapped_out": self.simulated.swapped_out,
            "recomputed": self.simulated.recomputed,
        }


@dataclass
class Planner:
    """Ranks and replays plans of one setting. Every replay is of all requests, and is done once."""

    setting: Setting
    hardware_changed: HardwareSpec | None = None
    """Instead of the catalogue's."""
    _replays: dict[tuple[Plan, Limits], Replay | None] = field(default_factory=dict)

    @cached_property
    def model(self) -> PlannedModel:
        """The shape."""
        return shape(self.setting.model)

    @cached_property
    def hardware(self) -> HardwareSpec:
        """The node."""
        return self.hardware_changed or hardware(f"{self.setting.ranks}x{self.setting.node}")

    @cached_property
    def job(self) -> Workload:
        """The requests."""
        return draw(self.setting.trace, self.setting.requests, self.model.spec.max_position)

    def ranking(self, plans: Sequence[Plan] | None = None, **choices: Any) -> Ranking:
        """All plans, or those given, by the closed form; `choices` are those of `SearchOptions`."""
        options = SearchOptions(
            device_memory=int(MEMORY_SHARE * self.hardware.memory),
            host_kv=int(self.setting.host_gib * GIB) * self.hardware.ranks,
            plans=tuple(plans) if plans else None,
            replays=1,
            replayed_tokens=1,  # what is replayed here is replayed in full, by `replay`
            **choices,
        )
        return search(self.model, self.hardware, self.job, DTYPE, options=options)

    def replay(self, candidate: Candidate, **changes: Any) -> Replay | None:
        """Run the whole job under a candidate, its limits changed; None if memory refuses."""
        limits = replace(candidate.limits, **changes)
        key = candidate.plan, limits
        if key not in self._replays:
            estimated = candidate.estimate.seconds if limits == candidate.limits else None
            self._replays[key] = self._run(candidate.plan, limits, estimated)
        return self._replays[key]

    def _run(self, plan: Plan, limits: Limits, estimated: float | None) -> Replay | None:
        try:
            setup = set_up(self.model, plan, DTYPE, limits)
        except MemoryBudgetError:
            return None
        return Replay(plan, limits, estimated, setup, simulate(setup, self.hardware, self.job))

    def best(self, candidates: Sequence[Candidate], count: int, **changes: Any) -> list[Replay]:
        """The first `count` candidates that memory allows, replayed, fastest first.

        One whose estimate is `HOPELESS` times the first one's is not replayed, nor are those behind it.
        """
        done: list[Replay] = []
        for candidate in candidates:
            if len(done) == count or candidate.estimate.seconds > HOPELESS * candidates[0].estimate.seconds:
                break
            replay = self.replay(candidate, **changes)
            if replay:
                done.append(replay)
        return sorted(done, key=lambda one: one.seconds)

    def tuned(self, candidates: Sequence[Candidate], count: int) -> list[Replay]:
        """As `best`; then the winner's chunk is halved while that makes it faster, and else doubled."""
        done = self.best(candidates, count)
        if not done:
            return []
        [candidate] = [one for one in candidates if one.plan == done[0].plan]
        for direction in (smaller_chunk, larger_chunk):
            climbed = False
            while (chunk := direction(done[0].limits.chunk)) is not None:
                tried = self.replay(candidate, chunk=chunk, micro_batches=done[0].limits.micro_batches)
                if tried is None:
                    break
                faster = tried.seconds < done[0].seconds
                done = sorted({*done, tried}, key=lambda one: one.seconds)
                if not faster:
                    break
                climbed = True
            if climbed:
                break
        return done


def candidates(ranking: Ranking, *, separate: bool) -> list[Candidate]:
    """Of two phases or of one layout, by their estimates."""
    every = (*ranking.replayed, *ranking.others)
    chosen = [one for one in every if one.plan.separate == separate]
    return sorted(chosen, key=lambda one: one.estimate.seconds)


def static_plans(ranks: int) -> list[Plan]:
    """All layouts of so many ranks."""
    found = []
    for tp in _divisors(ranks):
        for pp in _divisors(ranks // tp):
            layout = Layout(dp=ranks // tp // pp, pp=pp, tp=tp)
            found.append(Plan(layout, layout, separate=False))
    return found


def smaller_chunk(chunk: int | None) -> int | None:
    """The next smaller one."""
    return max((one for one in _LADDER if chunk is not None and one < chunk), default=None)


def larger_chunk(chunk: int | None) -> int | None:
    """The next larger one."""
    return min((one for one in _LADDER if chunk is not None and one > chunk), default=None)


def draw(trace: str, requests: int, context: int) -> Workload:
    """So many requests of a trace, all of which fit the context: as many more are drawn as do not."""
    drawn = requests
    while True:
        job = workload(trace, drawn).within(context)
        if len(job) >= requests:
            return replace(job, prompt=job.prompt[:requests], output=job.output[:requests], notes=())
        drawn = max(drawn + 1, math.ceil(drawn * requests / len(job)))


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive numbers."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# ---- running, writing ------------------------------------------------------------------------------------------


def run_all(work: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> list[Result]:
    """`work` on all items, in processes of their own if more than one may run; progress goes to stderr."""
    results: list[Result] = []
    if jobs == 1:
        for item in items:
            results.append(work(item))
            print(f"{len(results)} of {len(items)}: {item}", file=sys.stderr, flush=True)
        return results
    with ProcessPoolExecutor(jobs) as pool:
        for item, result in zip(items, pool.map(work, items), strict=True):
            results.append(result)
            print(f"{len(results)} of {len(items)}: {item}", file=sys.stderr, flush=True)
    return results


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; the first `text` columns are aligned left, the others right."""
    rule = ["---"] * text + ["---:"] * (len(columns) - text)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def put(page: Path, tables: dict[str, str]) -> None:
    """Write tables between their marks in a page."""
    text = page.read_text()
    for name, body in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = before + start + body + "\n" + rest[rest.index(end) :]
    page.write_text(text)


def arguments(about: str, quick: str) -> argparse.Namespace:
    """What was asked of a study."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--record", action="store_true", help="write the record and the page's tables")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    return parser.parse_args()


def conclude(
    tables: dict[str, str], page: Path, name: str, title: str, found: dict[str, Any], *, recorded: bool
) -> None:
    """Print the tables and, if asked, write them into the page and into a record."""
    for heading, body in tables.items():
        print(f"{heading}\n\n{body}\n")
    if recorded:
        put(page, tables)
        note = f"Simulated, not measured on the devices: docs/{page.name} says what is assumed and reads it."
        print(record(name, title, note, {key.capitalize(): body for key, body in tables.items()}, found))


def record(name: str, title: str, note: str, tables: dict[str, str], found: dict[str, Any]) -> Path:
    """Write `<date>-NAME.md` and `.json` into the results; returns the former. `tables` are by heading."""
    today = date.today().isoformat()
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    facts = versions()
    parts = [f"# {title}, {today}", note, "Repeat with", f"    {command}"]
    parts.append(table(["", ""], [[key, value] for key, value in facts.items()], 2))
    for heading, body in tables.items():
        parts += [f"## {heading}", body]
    stem = RESULTS / f"{today}-{name}"
    stem.with_name(f"{stem.name}.md").write_text("\n\n".join(parts) + "\n")
    content = {"command": command, "date": today, "note": note, "versions": facts, **found}
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return stem.with_name(f"{stem.name}.md")
