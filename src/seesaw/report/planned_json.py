"""What `seesaw plan --json` and `seesaw simulate --json` write. Keys are stable; `version` grows when one changes its
meaning or goes. Times are in seconds, sizes in bytes, rates per second, shares from 0 to 1; docs/planning.md has a
table of the keys.

A plan's `replay` is what the twin found, request by request. Where it is null, the plan's rates come from `estimate`,
the closed form. Pairs are [prefill, decode].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from seesaw.core.hardware import HardwareSpec

if TYPE_CHECKING:
    from seesaw.planning.bound import Bound
    from seesaw.planning.candidates import Candidate, Ranking
    from seesaw.planning.setup import Limits, Setup
    from seesaw.planning.shapes import PlannedModel
    from seesaw.planning.twin import Latency, Simulated
    from seesaw.planning.workloads import Workload
    from seesaw.report.replays import Replay

VERSION = 1


class ModelEntry(msgspec.Struct, kw_only=True):
    """The model that was planned for."""

    name: str
    parameters: int
    active_parameters: int
    """That serve one token: fewer than all in a mixture of experts."""
    weight_bits: float
    kv_bits: int
    weight_bytes: int
    kv_bytes_per_token: int
    layers: int
    context: int


class WorkloadEntry(msgspec.Struct, kw_only=True):
    """The requests; lengths in tokens."""

    name: str
    requests: int
    sampled: int
    """Requests whose lengths were kept: an even sample of a very large job file, else all."""
    mean_prompt: float
    mean_output: float
    percentiles: dict[str, tuple[float, float]]
    """[prompt, output] tokens by `p50`, `p90`, `p99`."""
    arrivals: bool
    notes: list[str]


class TurnEntry(msgspec.Struct, kw_only=True):
    """What the scheduler expects of turning back to prefill, in seconds."""

    step: float
    """A decode step, however few sequences it has."""
    turn: float
    """To prefill and back, apart from the work done there."""
    block: float
    """Swapping a KV block out and in again."""


class SettingsEntry(msgspec.Struct, kw_only=True):
    """How a plan is run. Null leaves the choice to the engine."""

    policy: str | None
    chunk: int | None
    """Most tokens of a batch that holds prefill."""
    max_running: int
    """Most sequences on one replica."""
    transition: str | None
    """`resident`, `delta` or `reload`."""
    device_memory: int
    """Budget of a rank."""
    host_kv: int
    """Budget of the host buffer."""
    block_size: int
    max_model_len: int | None
    micro_batches: tuple[int, int] | None
    """In flight on one replica; null for one a pipeline stage."""
    turn_costs: TurnEntry | None
    """By which policy `seesaw` decides when to turn back to prefill."""
    stages: tuple[list[int], list[int]] | None
    """Layers of each pipeline stage, by where their attention is."""
    carried: tuple[list[int], list[int]] | None
    """FFN columns, of the layer before its first, that each stage computes instead of the stage before; empty where
    no layer is divided."""


class MemoryEntry(msgspec.Struct, kw_only=True):
    """What is allocated; lists have an entry for each rank."""

    weights: list[int]
    """The most that a rank holds at any time, transitions included."""
    workspace: list[int]
    """Everything but weights and KV."""
    parts: list[dict[str, int]]
    """What the workspace is made of."""
    pool: list[int]
    """The KV pool."""
    device_blocks: tuple[int, int]
    """KV blocks of a replica."""
    host_blocks: int


class EstimateEntry(msgspec.Struct, kw_only=True):
    """The closed form."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    transition_seconds: float
    transitions: float
    batch: float
    """Sequences decoding at once on the node."""


class PhaseEntry(msgspec.Struct, kw_only=True):
    """A phase of a replay."""

    seconds: float
    forwards: int
    tokens: int
    """Fed to these Forwards."""
    batch: float
    """Mean number of sequences that a Forward samples a token for."""
    causes: dict[str, float]
    """Seconds by cause, averaged over all pipeline stages; they add up to `seconds`."""


class LatencyEntry(msgspec.Struct, kw_only=True):
    """Seconds by percentile (`p50`, `p90`, `p99`)."""

    ttft: dict[str, float]
    inter_token: dict[str, float]
    end_to_end: dict[str, float]


class ReplayEntry(msgspec.Struct, kw_only=True):
    """What the twin found."""

    seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    rows_per_second: float
    phases: dict[str, PhaseEntry]
    """`prefill`, `decode` and `transition`, or `mixed` of a static plan; they add up to `seconds`."""
    waited: dict[str, float]
    """The same seconds as the engine's own statistics count them: by what each completion waited for was of."""
    transitions: int
    swapped_out: int
    """Sequences moved to the host buffer to make room."""
    recomputed: int
    """Sequences computed again, for want of room."""
    buffer: list[tuple[float, float]]
    """[seconds, share of the host buffer in use] over time."""
    latency: LatencyEntry | None


class PlanEntry(msgspec.Struct, kw_only=True):
    """A plan of a ranking."""

    plan: str
    static: bool
    seconds: float
    """Predicted for the whole job."""
    tokens_per_second: float
    """Prompts and outputs."""
    rows_per_second: float
    over_best_static: float | None
    share_of_bound: float
    settings: SettingsEntry
    memory: MemoryEntry | None
    estimate: EstimateEntry
    replay: ReplayEntry | None


class BoundEntry(msgspec.Struct, kw_only=True):
    """The least that any plan on this node can take."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    flops: float
    bytes: float


class RefusalEntry(msgspec.Struct, kw_only=True):
    """A plan that cannot be run, and why."""

    plan: str
    reason: str


class RankingEntry(msgspec.Struct, kw_only=True):
    """`seesaw plan --json`."""

    version: int = VERSION
    model: ModelEntry
    hardware: HardwareSpec
    profile: str | None
    """File of the measured profile; null for the catalogue."""
    workload: WorkloadEntry
    dtype: str
    """Of computation."""
    best: str
    best_static: str | None
    command: str
    """Runs the best plan."""
    bound: BoundEntry
    plans: list[PlanEntry]
    """Replayed ones first, best first; then those only estimated."""
    refused: list[RefusalEntry]
    considered: int
    notes: list[str]


class ReplayedPlan(msgspec.Struct, kw_only=True):
    """A plan of `seesaw simulate`: `error` says why it could not be replayed, and everything else is null then."""

    plan: str
    error: str | None
    settings: SettingsEntry
    memory: MemoryEntry | None
    over_first: float | None
    """Tokens per second over those of the first plan that was replayed."""
    share_of_bound: float | None
    replay: ReplayEntry | None


class SimulationEntry(msgspec.Struct, kw_only=True):
    """`seesaw simulate --json`."""

    version: int = VERSION
    model: ModelEntry
    hardware: HardwareSpec
    profile: str | None
    workload: WorkloadEntry
    dtype: str
    bound: BoundEntry
    plans: list[ReplayedPlan]
    """In the order given."""
    notes: list[str]


def encoded(entry: RankingEntry | SimulationEntry) -> str:
    """As JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(entry), indent=2).decode() + "\n"


def ranking_entry(
    ranking: Ranking, *, profile: Path | None, command: str, notes: Sequence[str]
) -> RankingEntry:
    """All of a ranking."""
    return RankingEntry(
        model=model_entry(ranking.model),
        hardware=ranking.hardware,
        profile=None if profile is None else str(profile),
        workload=workload_entry(ranking.workload),
        dtype=ranking.dtype,
        best=ranking.best.name,
        best_static=None if ranking.best_static is None else ranking.best_static.name,
        command=command,
        bound=msgspec.convert(ranking.bound, BoundEntry, from_attributes=True),
        plans=[plan_entry(ranking, candidate) for candidate in (*ranking.replayed, *ranking.others)],
        refused=[RefusalEntry(plan=plan, reason=why) for plan, why in ranking.refused],
        considered=ranking.considered,
        notes=[*ranking.notes, *notes],
    )


def simulation_entry(
    model: PlannedModel,
    hardware: HardwareSpec,
    workload: Workload,
    replays: Sequence[Replay],
    *,
    dtype: str,
    bound: Bound,
    profile: Path | None,
    notes: Sequence[str],
) -> SimulationEntry:
    """All of some replays."""
    first = next((replay.simulated for replay in replays if replay.simulated is not None), None)
    return SimulationEntry(
        model=model_entry(model),
        hardware=hardware,
        profile=None if profile is None else str(profile),
        workload=workload_entry(workload),
        dtype=dtype,
        bound=msgspec.convert(bound, BoundEntry, from_attributes=True),
        plans=[_replayed(replay, first, bound) for replay in replays],
        notes=list(notes),
    )


def _replayed(replay: Replay, first: Simulated | None, bound: Bound) -> ReplayedPlan:
    setup, done = replay.setup, replay.simulated
    return ReplayedPlan(
        plan=replay.name,
        error=replay.error,
        settings=settings_entry(replay.limits, setup),
        memory=None if setup is None else memory_entry(setup),
        over_first=None if done is None or first is None else done.rate / first.rate,
        share_of_bound=None if done is None else bound.seconds / done.seconds,
        replay=None if done is None else replay_entry(done),
    )


def model_entry(model: PlannedModel) -> ModelEntry:
    """Its sizes."""
    return ModelEntry(
        name=model.name,
        parameters=model.parameters(),
        active_parameters=model.active_parameters(),
        weight_bits=model.weight_bits,
        kv_bits=model.kv_bits,
        weight_bytes=model.weight_bytes(),
        kv_bytes_per_token=model.kv_bytes_per_token(),
        layers=model.spec.layers,
        context=model.spec.max_position,
    )


def workload_entry(workload: Workload) -> WorkloadEntry:
    """Its lengths, summed up."""
    marks = (50, 90, 99)
    pairs = workload.percentiles(*marks)
    return WorkloadEntry(
        name=workload.name,
        requests=workload.requests,
        sampled=len(workload),
        mean_prompt=workload.mean_prompt,
        mean_output=workload.mean_output,
        percentiles={f"p{mark}": pair for mark, pair in zip(marks, pairs, strict=True)},
        arrivals=workload.arrival_s is not None,
        notes=list(workload.notes),
    )


def plan_entry(ranking: Ranking, candidate: Candidate) -> PlanEntry:
    """A candidate."""
    static, setup = ranking.best_static, candidate.setup
    return PlanEntry(
        plan=candidate.name,
        static=not candidate.plan.separate,
        seconds=candidate.seconds,
        tokens_per_second=candidate.rate,
        rows_per_second=candidate.rows_per_second,
        over_best_static=None if static is None else candidate.rate / static.rate,
        share_of_bound=ranking.bound.seconds / candidate.seconds,
        settings=settings_entry(candidate.limits, setup),
        memory=None if setup is None else memory_entry(setup),
        estimate=msgspec.convert(candidate.estimate, EstimateEntry, from_attributes=True),
        replay=None if candidate.simulated is None else replay_entry(candidate.simulated),
    )


def settings_entry(limits: Limits, setup: Setup | None) -> SettingsEntry:
    """Budgets as given, everything else as worked out; as asked for where nothing has been worked out."""
    entry = SettingsEntry(
        policy=limits.policy,
        chunk=limits.chunk,
        max_running=limits.max_running,
        transition=limits.transition,
        device_memory=limits.device_memory,
        host_kv=limits.host_kv,
        block_size=limits.block_size,
        max_model_len=limits.max_model_len,
        micro_batches=limits.micro_batches,
        turn_costs=msgspec.convert(limits.turn_costs, TurnEntry | None, from_attributes=True),
        stages=None,
        carried=None,
    )
    if setup is None:
        return entry
    prefill, decode = ([len(stage) for stage in sharding.stages] for sharding in setup.shardings)
    carried, in_decode = (list(sharding.carried) for sharding in setup.shardings)
    return msgspec.structs.replace(
        entry,
        policy=setup.scheduler.policy,
        chunk=setup.scheduler.max_batch_tokens,
        transition=setup.memory.mode if setup.plan.reshards else None,
        max_model_len=setup.memory.max_model_len,
        stages=(prefill, decode),
        carried=(carried, in_decode),
    )


def memory_entry(setup: Setup) -> MemoryEntry:
    """What each rank and the host hold."""
    memory = setup.memory
    return MemoryEntry(
        weights=list(memory.weights),
        workspace=list(memory.workspace),
        parts=[dict(of_rank) for of_rank in memory.parts],
        pool=list(memory.pool),
        device_blocks=memory.device_blocks,
        host_blocks=memory.host_blocks,
    )


def replay_entry(done: Simulated) -> ReplayEntry:
    """All of a replay."""
    return ReplayEntry(
        seconds=done.seconds,
        requests=done.requests,
        prompt_tokens=done.prompt_tokens,
        output_tokens=done.output_tokens,
        tokens_per_second=done.rate,
        rows_per_second=done.rows_per_second,
        phases={
            name: msgspec.convert(report, PhaseEntry, from_attributes=True)
            for name, report in done.phases.items()
        },
        waited=dict(done.waited),
        transitions=done.transitions,
        swapped_out=done.swapped_out,
        recomputed=done.recomputed,
        buffer=list(done.buffer),
        latency=None if done.latency is None else latency_entry(done.latency),
    )


def latency_entry(latency: Latency) -> LatencyEntry:
    """Percentiles under names."""
    return LatencyEntry(
        ttft=_named(latency.ttft),
        inter_token=_named(latency.inter_token),
        end_to_end=_named(latency.end_to_end),
    )


def _named(percentiles: dict[int, float]) -> dict[str, float]:
    return {f"p{mark}": seconds for mark, seconds in percentiles.items()}
