"""Runs contestants on workloads in turn, each kept still while another runs, and finds each one's floor."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from seesaw.bench import sessions
from seesaw.bench.contestant import Contestant, deployment_of, prepared
from seesaw.bench.floor import floor_of
from seesaw.bench.probe import ProbeResult, measure
from seesaw.bench.process import ContestantError, Guard, JsonProcess
from seesaw.bench.profiles import read_profiles
from seesaw.bench.results import Entry, Run, WorkloadResult
from seesaw.bench.workloads import Workload
from seesaw.core.layout import Plan
from seesaw.core.model_spec import ModelSpec
from seesaw.core.node import Place
from seesaw.core.units import format_bytes
from seesaw.preflight.system import available_memory

logger = logging.getLogger(__name__)

WARM_UP_REQUESTS, WARM_UP_OUTPUT = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How a bench is run."""

    rounds: int = 5
    dtype: str = "bfloat16"
    """Of weights and KV, for contestants that do not say."""
    seed: int = 0
    """Of the prompts."""
    fresh: bool = False
    """Start every contestant anew in every round."""
    floor: bool = True
    """Measure the machine and give floors."""
    profile: bool = False
    """Have the ranks of Seesaw's contestants time their functions."""
    node: str | None = None
    """Node file for Seesaw's contestants."""
    device_memory: str | None = None
    host_kv: str | None = None
    start_timeout: float = 1800.0
    run_timeout: float = 3600.0


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """Everything a bench found."""

    options: BenchOptions
    results: list[WorkloadResult] = field(default_factory=list)
    probes: dict[int, ProbeResult] = field(default_factory=dict)
    """By number of ranks."""
    interrupted: bool = False


class Bench:
    """Compares contestants on one model. Owns their processes and `folder`, where their messages go."""

    def __init__(self, model: Path, spec: ModelSpec, options: BenchOptions, folder: Path) -> None:
        self._model, self._spec, self._options, self._folder = model, spec, options, folder
        self._logs = self._profiles = 0

    def run(self, workloads: Sequence[Workload], contestants: Sequence[Contestant]) -> BenchResult:
        """All rounds of all contestants on each workload in turn.

        A contestant that fails keeps the runs it has and its error. What cannot be started at all is refused
        by a `ConfigError` before anything starts. Ctrl-C ends the bench; the result says so and has what was
        measured.
        """
        asked = {
            workload: [self._prepare(contestant, workload) for contestant in contestants]
            for workload in workloads
        }
        found = BenchResult(options=self._options)
        with Guard() as guard:
            try:
                for workload, prepared_ones in asked.items():
                    self._probe(found, asked, guard)
                    result = WorkloadResult(
                        workload=workload, entries=[Entry(contestant=one) for one in prepared_ones]
                    )
                    found.results.append(result)
                    self._compete(result, guard)
                    for entry in result.entries:
                        if "profile" in entry.contestant.options:
                            entry.profile = read_profiles(Path(entry.contestant.options["profile"]))
                self._probe(found, asked, guard)
            except KeyboardInterrupt:
                found.interrupted = True
        for result in found.results:
            for entry in result.entries:
                self._explain(entry, result.workload, found.probes)
        return found

    def _prepare(self, contestant: Contestant, workload: Workload) -> Contestant:
        options = self._options
        found = prepared(
            contestant,
            self._spec,
            workload,
            dtype=options.dtype,
            node=options.node,
            device_memory=options.device_memory,
            host_kv=options.host_kv,
        )
        if found.kind == "seesaw":
            if options.profile:
                self._profiles += 1
                folder = self._folder / f"profile-{self._profiles}"
                folder.mkdir(exist_ok=True)
                found = found.with_defaults(profile=str(folder))
            deployment_of(found, self._model)
        return found

    # ---- the runs -----------------------------------------------------------------------------------------

    def _compete(self, result: WorkloadResult, guard: Guard) -> None:
        prompts = result.workload.prompts(self._spec.vocab, self._options.seed)
        live: dict[str, JsonProcess] = {}
        with ExitStack() as stack:
            stack.callback(_close_all, live)
            for number in range(self._options.rounds):
                shift = number % len(result.entries)  # nobody always runs behind the same rival
                for entry in [*result.entries[shift:], *result.entries[:shift]]:
                    if entry.error is None:
                        self._turn(entry, result.workload, prompts, number, live, guard)

    def _turn(
        self,
        entry: Entry,
        workload: Workload,
        prompts: list[list[int]],
        number: int,
        live: dict[str, JsonProcess],
        guard: Guard,
    ) -> None:
        """One counted run; the contestant is started first if need be, and stands still afterwards."""
        try:
            process = live.pop(entry.name, None)
            if process is not None:
                live[entry.name] = process  # last, as the one that ran last
            else:
                _make_room(entry.contestant, live)
                process = live[entry.name] = self._start(entry, guard)
                self._open(entry, workload, process)
            process.thaw()
            ask = {"op": "run", "prompts": prompts, "outputs": workload.outputs()}
            before = sessions.machine_seconds() - sessions.processor_seconds(process.session)
            started = time.monotonic()
            answer = process.ask(ask, self._options.run_timeout)
            elapsed = time.monotonic() - started
            spent = sessions.machine_seconds() - sessions.processor_seconds(process.session) - before
            if self._options.fresh:
                live.pop(entry.name).close()
            else:
                process.freeze()
        except ContestantError as error:
            entry.error = str(error)
            logger.warning("%s: %s: %s", workload.name, entry.name, error)
            if entry.name in live:
                live.pop(entry.name).close(patience=1.0)
            return
        entry.about |= answer["details"].pop("engine", {})  # the planner may have chosen since it was opened
        run = Run(
            round=number,
            seconds=answer["seconds"],
            prompt_tokens=answer["prompt_tokens"],
            output_tokens=answer["output_tokens"],
            others=min(1.0, max(0.0, spent / elapsed / (os.cpu_count() or 1))),
            details=answer["details"],
        )
        entry.runs.append(run)
        logger.info(
            "%s, round %d of %d: %s %.2f s, %s tokens/s",
            workload.name,
            number + 1,
            self._options.rounds,
            entry.name,
            run.seconds,
            f"{run.rate:,.0f}",
        )

    def _start(self, entry: Entry, guard: Guard) -> JsonProcess:
        self._logs += 1
        log = self._folder / f"contestant-{self._logs}.log"
        return JsonProcess(entry.contestant.command, guard=guard, log=log)

    def _open(self, entry: Entry, workload: Workload, process: JsonProcess) -> None:
        """Start the engine and warm it up. Raises `ContestantError`."""
        contestant = entry.contestant
        logger.info("%s: starting %s", workload.name, contestant.name)
        ready = process.ask(
            {"op": "open", "model": str(self._model), "options": dict(contestant.options)},
            self._options.start_timeout,
        )
        entry.about, entry.start_seconds = ready["about"], ready["seconds"]
        sample = workload.sample(WARM_UP_REQUESTS, WARM_UP_OUTPUT)
        prompts = sample.prompts(self._spec.vocab, self._options.seed + 1)
        ask = {"op": "run", "prompts": prompts, "outputs": sample.outputs()}
        process.ask(ask, self._options.run_timeout)

    # ---- floors -------------------------------------------------------------------------------------------

    def _probe(self, found: BenchResult, asked: dict[Workload, list[Contestant]], guard: Guard) -> None:
        """Measure the places of each number of ranks that competes; what they reached at any time counts."""
        if not self._options.floor:
            return
        everyone = [contestant for group in asked.values() for contestant in group]
        dtypes = list(dict.fromkeys(str(one.options["dtype"]) for one in everyone))
        places: dict[int, Sequence[Place]] = {}
        for one in everyone:
            if one.kind == "seesaw":
                places[one.world] = deployment_of(one, self._model).places
        for ranks, where in sorted(places.items()):
            logger.info("measuring the cores of %d ranks", ranks)
            try:
                measured = measure(self._spec, where, dtypes, guard=guard, folder=self._folder)
                earlier = found.probes.get(ranks)
                found.probes[ranks] = measured.best_of(earlier) if earlier else measured
            except ContestantError as error:
                logger.warning("no floors for %d ranks: %s", ranks, error)

    def _explain(self, entry: Entry, workload: Workload, probes: dict[int, ProbeResult]) -> None:
        """Give a contestant with runs its floor. An engine of others has what the most ranks together have."""
        contestant = entry.contestant
        own = contestant.world if contestant.kind == "seesaw" else max(probes, default=0)
        if own not in probes or not entry.runs:
            return
        dtype = str(contestant.options["dtype"])
        entry.copy_rate = probes[own].copy
        entry.floor = floor_of(
            self._spec, dtype, workload.lengths, probes[own].rates(dtype), **_limits(entry)
        )


def _make_room(contestant: Contestant, live: dict[str, JsonProcess]) -> None:
    """Close those that ran longest ago until there is memory for one more; when it is their turn they start anew.

    Those that are live have run this workload once, so that they have taken what they will.
    """
    while (free := available_memory()) < contestant.memory and live:
        name = next(iter(live))
        logger.info("closing %s, which leaves no memory for %s beside it", name, contestant.name)
        live.pop(name).close()
    if free < contestant.memory:
        logger.warning(
            "%s may come to take %s, and %s are free: its runs may be slow, or end; --device-memory and "
            "--host-kv bound it",
            contestant.name,
            format_bytes(contestant.memory),
            format_bytes(free),
        )


def _close_all(live: dict[str, JsonProcess]) -> None:
    while live:
        live.popitem()[1].close()


def _limits(entry: Entry) -> dict[str, int]:
    """What bounds the batches of a Seesaw contestant, over all its replicas."""
    about = entry.about
    if "device_blocks" not in about:
        return {}
    replicas = Plan.parse(about["plan"]).decode.dp
    return {
        "batch_tokens": about["chunk"],
        "capacity": about["device_blocks"][1] * about["block_size"] * replicas,
        "max_running": about["max_running"] * replicas,
    }
