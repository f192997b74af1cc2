"""What follows from a plan and its limits: shardings, memory, the scheduler's settings. For the engine and for the
twin alike, so that a simulated job runs under the very books of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import DType, ModelSpec
from seesaw.planning.device_costs import HOST, DeviceCosts
from seesaw.planning.memory import MemoryBudget, MemoryPlan, TransitionMode, plan_memory
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.shardings import Stages, plan_shardings
from seesaw.scheduling.config import PolicyName, SchedulerConfig, TurnCosts
from seesaw.weights.sharding import Sharding

TOKENS_IN_FLIGHT = 2048
"""Of prefill, where no chunk is asked for: shared out over the pipeline stages."""
LEAST_CHUNK = 256
"""Fewer rows than this make matrix products slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan may use, and how it is run. Bytes are per rank (`device_memory`) and per node (`host_kv`)."""

    device_memory: int
    host_kv: int
    policy: str | None = None
    """None: `seesaw` for two phases, `chunked` for one."""
    chunk: int | None = None
    """Most tokens of a batch that holds prefill; None shares `TOKENS_IN_FLIGHT` out."""
    max_running: int = 256
    micro_batches: tuple[int, int] | None = None
    """Groups of sequences that take turns in a replica's pipeline, of prefill and decode; None: one a stage."""
    turn_costs: TurnCosts | None = None
    """By which policy `seesaw` decides when to turn back to prefill."""
    block_size: int = 16
    max_model_len: int | None = None
    stages: Stages | None = None
    """Layers of each pipeline stage of prefill and decode; None balances them."""
    transition: TransitionMode | None = None
    overlap: bool = True
    seed: int = 0
    costs: DeviceCosts = HOST
    """What the devices take of their memory beside the model."""

    def budget(self, prefill: Layout, *, separate: bool) -> MemoryBudget:
        """What the memory of a plan with this prefill layout is worked out by."""
        return MemoryBudget(
            device=self.device_memory,
            host_kv=self.host_kv,
            block_size=self.block_size,
            max_batch_tokens=self.chunk or max(TOKENS_IN_FLIGHT // prefill.pp, LEAST_CHUNK),
            max_running=self.max_running,
            max_model_len=self.max_model_len,
            two_phases=separate,
            mode=self.transition,
            costs=self.costs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A plan worked out. Pairs are (prefill, decode)."""

    model: PlannedModel
    plan: Plan
    dtype: DType
    """Of computation: products, activations, what ranks send each other."""
    shardings: tuple[Sharding, Sharding]
    memory: MemoryPlan
    scheduler: SchedulerConfig

    @property
    def spec(self) -> ModelSpec:
        """The model's shape, but for its experts."""
        return self.model.spec


def set_up(model: PlannedModel, plan: Plan, dtype: DType, limits: Limits) -> Setup:
    """Work a plan out; `dtype` is that of computation.

    Raises `LayoutError` or `MemoryBudgetError` if it cannot be run within its limits.
    """
    shardings = plan_shardings(model, plan, limits.stages)
    budget = limits.budget(plan.prefill, separate=plan.separate)
    memory = plan_memory(model, shardings, dtype, budget)
    scheduler = SchedulerConfig(
        plan=plan,
        policy=cast(PolicyName, limits.policy or ("seesaw" if plan.separate else "chunked")),
        block_size=limits.block_size,
        device_blocks=memory.device_blocks,
        host_blocks=memory.host_blocks,
        max_model_len=memory.max_model_len,
        max_batch_tokens=budget.max_batch_tokens,
        max_running=limits.max_running,
        micro_batches=limits.micro_batches,
        turn_costs=limits.turn_costs,
        overlap=limits.overlap,
        seed=limits.seed,
    )
    return Setup(model=model, plan=plan, dtype=dtype, shardings=shardings, memory=memory, scheduler=scheduler)
