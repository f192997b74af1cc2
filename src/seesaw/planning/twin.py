"""The digital twin: the engine's scheduler over the simulated executor, on hardware that need not exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seesaw.core.actions import DECODE, PREFILL, Transition
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.planning.cost import LayoutCost
from seesaw.planning.setup import Setup
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.simulated import Moves, SimulatedExecutor, Spent, StageRanks
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from seesaw.weights.sharding import Sharding, copy_list


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated job came to. Pairs are (prefill, decode)."""

    seconds: float
    phase_seconds: dict[str, float]
    """Virtual time by phase; `mixed` for static plans."""
    prompt_tokens: int
    output_tokens: int
    transitions: int
    swapped_out: int
    recomputed: int
    spent: tuple[Spent, Spent]

    @property
    def rate(self) -> float:
        """Prompt and output tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds


def simulate(
    setup: Setup, model: PlannedModel, hardware: HardwareSpec, lengths: Iterable[tuple[int, int]]
) -> Simulated:
    """Run requests of (prompt tokens, output tokens), all handed over at once.

    Raises `RequestError` for one that can never fit.
    """
    executor = simulated_executor(setup, model, hardware)
    scheduler = Scheduler(setup.scheduler, create_policy(setup.scheduler))
    totals, phases, transitions = [0, 0], {"prefill": 0.0, "decode": 0.0, "mixed": 0.0}, 0
    source = enumerate(lengths)
    while True:
        while scheduler.wants_requests and scheduler.more_expected:
            number, pair = next(source, (0, None))
            if pair is None:
                scheduler.more_expected = False
                break
            scheduler.add(_request(number, *pair), frozenset())
            totals[0] += pair[0]
        if not scheduler.unfinished:
            break
        for action in scheduler.schedule():
            transitions += isinstance(action, Transition)
            executor.submit(action)
        before = executor.now
        for completion in executor.wait():
            totals[1] += len(scheduler.complete(completion))
        scheduler.take_finished()
        phases[_phase(setup, scheduler)] += executor.now - before
    return Simulated(
        seconds=executor.now,
        phase_seconds={name: seconds for name, seconds in phases.items() if seconds},
        prompt_tokens=totals[0],
        output_tokens=totals[1],
        transitions=transitions,
        swapped_out=scheduler.counters.swapped_out,
        recomputed=scheduler.counters.recomputed,
        spent=executor.spent,
    )


def simulated_executor(setup: Setup, model: PlannedModel, hardware: HardwareSpec) -> SimulatedExecutor:
    """The executor that stands for the ranks of `setup` on `hardware`."""
    costs = [
        LayoutCost(model, hardware, sharding.layout, [len(stage) for stage in sharding.stages], setup.dtype)
        for sharding in setup.shardings
    ]
    prefill, decode = (_stage_ranks(sharding) for sharding in setup.shardings)
    return SimulatedExecutor((costs[PREFILL], costs[DECODE]), (prefill, decode), _moves(setup, hardware))


def _phase(setup: Setup, scheduler: Scheduler) -> str:
    if not setup.plan.separate:
        return "mixed"
    return "decode" if scheduler.phase == DECODE else "prefill"


def _request(number: int, prompt: int, output: int) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    return Request(id=str(number), prompt_token_ids=(0,) * prompt, sampling=sampling)


def _stage_ranks(sharding: Sharding) -> StageRanks:
    layout = sharding.layout
    return [
        [[sharding.rank(dp, pp, tp) for tp in range(layout.tp)] for pp in range(layout.pp)]
        for dp in range(layout.dp)
    ]


def _moves(setup: Setup, hardware: HardwareSpec) -> Moves:
    spec, layouts = setup.spec, [sharding.layout for sharding in setup.shardings]
    world = setup.plan.world
    to_host = _rate(layouts, hardware.to_host, hardware.node_to_host)
    to_device = _rate(layouts, hardware.to_device, hardware.node_to_device)
    fetched, seconds = [0, 0], [[0.0] * world, [0.0] * world]
    if setup.plan.reshards and setup.memory.mode != "resident":
        each = min(hardware.to_device, hardware.node_to_device / world)
        for target in (PREFILL, DECODE):
            old = setup.shardings[1 - target] if setup.memory.mode == "delta" else None
            for rank in range(world):
                copies = copy_list(spec, old, setup.shardings[target], rank)
                moved, copied = copies.bytes_fetched(setup.dtype), copies.bytes_copied(setup.dtype)
                fetched[target] += moved
                seconds[target][rank] = moved / each + copied / hardware.device_copy
    return Moves(
        block_bytes=float(spec.kv_bytes_per_token(setup.dtype) * setup.scheduler.block_size),
        to_host=to_host,
        to_device=to_device,
        transition_bytes=(fetched[0], fetched[1]),
        transition_seconds=(tuple(seconds[0]), tuple(seconds[1])),
    )


def _rate(layouts: Sequence[Layout], one: float, node: float) -> tuple[float, float]:
    """Of one replica's ranks together, with all replicas busy."""
    prefill, decode = (min(one * layout.replica_ranks, node / layout.dp) for layout in layouts)
    return prefill, decode
