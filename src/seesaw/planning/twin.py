"""The digital twin: the engine's scheduler over the simulated executor, on hardware that need not exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import inf

from seesaw.core.actions import (
    DECODE,
    PREFILL,
    Action,
    Completion,
    CopiesDone,
    Forward,
    ForwardDone,
    SwapIn,
    Transition,
)
from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.planning.accounts import CAUSES, PhaseReport
from seesaw.planning.cost import LayoutCost
from seesaw.planning.latency import Latency, LatencyMeter
from seesaw.planning.memory import footprint
from seesaw.planning.setup import Setup
from seesaw.planning.shardings import carried_shares
from seesaw.planning.simulated import TOKEN, Moves, SimulatedExecutor, StageRanks
from seesaw.planning.workloads import Workload
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from seesaw.weights.sharding import Sharding

__all__ = ["CAUSES", "Latency", "PhaseReport", "Simulated", "simulate", "simulated_executor"]

_BUFFER_POINTS = 240
_Lengths = tuple[int, int, float]
"""Prompt tokens, output tokens, arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated job came to."""

    seconds: float
    """Of virtual time, until the last request has ended."""
    requests: int
    prompt_tokens: int
    output_tokens: int
    phases: dict[str, PhaseReport]
    """`prefill` and `decode`, and `transition` where weights change; of static plans `mixed`. Their seconds add up
    to `seconds`. A transition begins when its first rank begins to change over and ends when the last is done;
    phases of one layout turn when all stages are through with the one before."""
    waited: dict[str, float]
    """The same seconds as `EngineStats.seconds_per_phase` counts them: the wait for each completion, by what it is
    of. There a pipeline drains in prefill, where here its first stage changes over already."""
    transitions: int
    swapped_out: int
    """Sequences preempted or parked by a swap-out."""
    recomputed: int
    """Sequences preempted without room on the host."""
    buffer: tuple[tuple[float, float], ...]
    """(virtual seconds, share of the host buffer that is used), at most 240 points; none without a buffer."""
    latency: Latency | None
    """None unless requests arrived over time."""

    @property
    def rate(self) -> float:
        """Prompt and output tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def rows_per_second(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def simulate(
    setup: Setup, hardware: HardwareSpec, workload: Workload | Iterable[tuple[int, int]]
) -> Simulated:
    """Run a workload, or requests of (prompt tokens, output tokens) that are all there from the start.

    With `workload.arrival_s`, a request is handed over when the clock has come to it. Raises `RequestError` for
    one that can never fit, and `ConfigError` if there is none.
    """
    timed = isinstance(workload, Workload) and workload.arrival_s is not None
    return _Simulation(setup, hardware, _requests(workload), timed).run()


def simulated_executor(setup: Setup, hardware: HardwareSpec) -> SimulatedExecutor:
    """The executor that stands for the ranks of `setup` on `hardware`."""
    prefill, decode = (
        LayoutCost(
            setup.model,
            hardware,
            sharding.layout,
            [len(stage) for stage in sharding.stages],
            setup.dtype,
            carried_shares(setup.model, sharding),
        )
        for sharding in setup.shardings
    )
    ranks = _stage_ranks(setup.shardings[PREFILL]), _stage_ranks(setup.shardings[DECODE])
    return SimulatedExecutor((prefill, decode), ranks, _moves(setup, hardware), separate=setup.plan.separate)


# ---- the loop --------------------------------------------------------------------------------------------------


class _Simulation:
    """One run: what `Engine.run` does, with arrivals instead of a source that is always ready."""

    def __init__(
        self, setup: Setup, hardware: HardwareSpec, requests: Iterator[_Lengths], timed: bool
    ) -> None:
        self._plan = setup.plan
        self._scheduler = Scheduler(setup.scheduler, create_policy(setup.scheduler))
        self._executor = simulated_executor(setup, hardware)
        self._source = requests
        self._next = next(requests, None)
        if self._next is None:
            raise ConfigError("an empty workload: there are no requests to simulate")
        self._meter = LatencyMeter() if timed else None
        self._buffer = _Buffer() if setup.scheduler.host_blocks else None
        self._waits = _Waits(setup.plan.separate)
        self._requests = self._prompts = self._outputs = self._transitions = 0

    def run(self) -> Simulated:
        """Until every request has ended."""
        scheduler, executor = self._scheduler, self._executor
        self._take_in()
        while scheduler.unfinished or self._next is not None:
            self._submit()
            self._await()
            self._take_in()
        return Simulated(
            seconds=executor.now,
            requests=self._requests,
            prompt_tokens=self._prompts,
            output_tokens=self._outputs,
            phases=executor.report(),
            waited=self._waits.seconds,
            transitions=self._transitions,
            swapped_out=scheduler.counters.swapped_out,
            recomputed=scheduler.counters.recomputed,
            buffer=self._buffer.points(executor.now) if self._buffer else (),
            latency=self._meter.latency() if self._meter else None,
        )

    def _take_in(self) -> None:
        """Hand over what has arrived, as far as the scheduler wants it. It waits for no request of the future."""
        scheduler, now = self._scheduler, self._executor.now
        while self._next is not None and self._next[2] <= now and scheduler.wants_requests:
            prompt, output, arrival = self._next
            for sequence in scheduler.add(_request(self._requests, prompt, output), frozenset()):
                if self._meter:
                    self._meter.arrived(sequence.id, arrival)
            self._requests += 1
            self._prompts += prompt
            self._next = next(self._source, None)
        scheduler.more_expected = self._next is not None and self._next[2] <= now

    def _submit(self) -> None:
        scheduler, executor = self._scheduler, self._executor
        before = scheduler.phase
        actions = scheduler.schedule()
        turns = scheduler.phase != before and not self._plan.reshards
        for action in actions:
            if turns and _belongs(action, scheduler.phase):
                executor.turn(scheduler.phase)
                turns = False
            self._transitions += isinstance(action, Transition)
            self._waits.submitted(action)
            executor.submit(action)
        if turns:
            executor.turn(scheduler.phase)

    def _await(self) -> None:
        """Until a completion, or until a request arrives that the scheduler would take."""
        scheduler, executor, meter = self._scheduler, self._executor, self._meter
        before, arrival = executor.now, self._next[2] if self._next is not None else inf
        # Of those that have arrived, the scheduler takes more once a completion has come in, as in the engine.
        completions = executor.wait(arrival if arrival > before and scheduler.wants_requests else inf)
        self._waits.waited(executor.now - before, completions)
        for completion in completions:
            updated = scheduler.complete(completion)
            self._outputs += len(updated)
            if meter:
                meter.tokens((sequence.id for sequence in updated), executor.now)
        for sequence in scheduler.take_finished():
            if meter:
                meter.finished(sequence.id, executor.now)
        if self._buffer and executor.now >= self._buffer.due:
            self._buffer.note(executor.now, scheduler.host.used / scheduler.host.total)


class _Waits:
    """Counts as `metering.Meter` does, on the virtual clock."""

    def __init__(self, separate: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._separate = separate
        self._activity = "prefill" if separate else "mixed"
        self._forwards: dict[int, str] = {}

    def submitted(self, action: Action) -> None:
        if isinstance(action, Forward):
            phase = "decode" if action.decodes else "prefill"
            self._forwards[action.id] = phase if self._separate else "mixed"

    def waited(self, seconds: float, completions: list[Completion]) -> None:
        activity = None
        for completion in completions:
            if isinstance(completion, ForwardDone):
                forward = self._forwards.pop(completion.id)
                activity = activity or forward
            elif not isinstance(completion, CopiesDone):
                activity = activity or "transition"
        self._activity = activity or self._activity
        self.seconds[self._activity] = self.seconds.get(self._activity, 0.0) + seconds


class _Buffer:
    """How full the host buffer is, at ever longer intervals as the job goes on."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = [(0.0, 0.0)]
        self._step = 0.0
        self.due = 0.0
        """When the next point is wanted."""

    def note(self, now: float, share: float) -> None:
        """The share used from `now` on."""
        if len(self._points) == _BUFFER_POINTS - 1:
            del self._points[1::2]
            self._step = 2 * max(self._step, now / _BUFFER_POINTS)
        self._points.append((now, share))
        self.due = now + self._step

    def points(self, end: float) -> tuple[tuple[float, float], ...]:
        """What was kept, and the buffer at the end of the job, empty."""
        return (*self._points, (end, 0.0))


def _belongs(action: Action, phase: int) -> bool:
    """Whether this is surely an action of `phase`, after an unseen turn to it."""
    if isinstance(action, Forward):
        return action.decodes == (phase == DECODE)
    return isinstance(action, SwapIn) and phase == DECODE


# ---- requests --------------------------------------------------------------------------------------------------


def _requests(workload: Workload | Iterable[tuple[int, int]]) -> Iterator[_Lengths]:
    if not isinstance(workload, Workload):
        return ((prompt, output, 0.0) for prompt, output in workload)
    arrivals = [0.0] * len(workload) if workload.arrival_s is None else workload.arrival_s.tolist()
    return zip(workload.prompt.tolist(), workload.output.tolist(), arrivals, strict=True)


def _request(number: int, prompt: int, output: int) -> Request:
    return Request(id=str(number), prompt_token_ids=(TOKEN,) * prompt, sampling=_sampling(output))


@lru_cache(maxsize=1 << 14)
def _sampling(output: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)


# ---- the executor ----------------------------------------------------------------------------------------------


def _stage_ranks(sharding: Sharding) -> StageRanks:
    layout = sharding.layout
    return [
        [[sharding.rank(dp, pp, tp) for tp in range(layout.tp)] for pp in range(layout.pp)]
        for dp in range(layout.dp)
    ]


def _moves(setup: Setup, hardware: HardwareSpec) -> Moves:
    block_bytes = float(setup.model.kv_bytes_per_token() * setup.scheduler.block_size)
    heads, world = setup.spec.kv_heads, setup.plan.world
    to_host, to_device = [], []
    for sharding in setup.shardings:
        layout = sharding.layout
        # The ranks of a stage share the KV heads; beyond one head each, several read the same one, and one of
        # them writes it.
        slab = block_bytes * max(len(stage) for stage in sharding.stages) / setup.spec.layers
        slab *= -(-heads // layout.tp) / heads
        writers = layout.dp * layout.pp * min(layout.tp, heads)
        to_host.append(slab / min(hardware.to_host, hardware.node_to_host / writers))
        to_device.append(slab / min(hardware.to_device, hardware.node_to_device / world))
    fetched, seconds = _transitions(setup, hardware)
    return Moves(
        block_bytes=block_bytes,
        to_host=(to_host[PREFILL], to_host[DECODE]),
        to_device=(to_device[PREFILL], to_device[DECODE]),
        transition_bytes=fetched,
        transition_seconds=seconds,
    )


def _transitions(
    setup: Setup, hardware: HardwareSpec
) -> tuple[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]]:
    """Bytes that all ranks fetch to get to the prefill layout and to the decode layout, and seconds by rank."""
    world, mode = setup.plan.world, setup.memory.mode
    fetched, seconds = [0, 0], [[0.0] * world, [0.0] * world]
    if setup.plan.reshards and mode != "resident":
        each = hardware.fetch or min(hardware.to_device, hardware.node_to_device / world)
        for target in (PREFILL, DECODE):
            old = setup.shardings[1 - target] if mode == "delta" else None
            changes = footprint(setup.model).changes(old, setup.shardings[target])
            fetched[target] = sum(change.fetched for change in changes)
            seconds[target] = [c.fetched / each + c.copied / hardware.device_copy for c in changes]
    return (fetched[0], fetched[1]), (tuple(seconds[0]), tuple(seconds[1]))
