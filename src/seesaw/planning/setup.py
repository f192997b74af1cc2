"""What follows from a plan and its limits: shardings, memory, the scheduler's settings. For the engine and for the
twin alike, so that a simulated job runs under the very books of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from seesaw.core.layout import Plan
from seesaw.core.model_spec import DType, ModelSpec
from seesaw.planning.memory import MemoryBudget, MemoryPlan, TransitionMode, plan_memory
from seesaw.scheduling.config import PolicyName, SchedulerConfig
from seesaw.weights.sharding import Sharding, assign_ranks, make_sharding
from seesaw.weights.stages import head_weight_in_layers, prefill_head_weight

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
    block_size: int = 16
    max_model_len: int | None = None
    transition: TransitionMode | None = None
    overlap: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A plan worked out. Pairs are (prefill, decode)."""

    spec: ModelSpec
    plan: Plan
    dtype: DType
    shardings: tuple[Sharding, Sharding]
    memory: MemoryPlan
    scheduler: SchedulerConfig


def set_up(spec: ModelSpec, plan: Plan, dtype: DType, limits: Limits) -> Setup:
    """Work a plan out. Raises `LayoutError` or `MemoryBudgetError` if it cannot be run within its limits."""
    shardings = plan_shardings(spec, plan)
    chunk = limits.chunk or max(TOKENS_IN_FLIGHT // plan.prefill.pp, LEAST_CHUNK)
    memory = plan_memory(
        spec,
        shardings,
        dtype,
        MemoryBudget(
            device=limits.device_memory,
            host_kv=limits.host_kv,
            block_size=limits.block_size,
            max_batch_tokens=chunk,
            max_running=limits.max_running,
            max_model_len=limits.max_model_len,
            two_phases=plan.separate,
            mode=limits.transition,
        ),
    )
    scheduler = SchedulerConfig(
        plan=plan,
        policy=cast(PolicyName, limits.policy or ("seesaw" if plan.separate else "chunked")),
        block_size=limits.block_size,
        device_blocks=memory.device_blocks,
        host_blocks=memory.host_blocks,
        max_model_len=memory.max_model_len,
        max_batch_tokens=chunk,
        max_running=limits.max_running,
        overlap=limits.overlap,
        seed=limits.seed,
    )
    return Setup(spec=spec, plan=plan, dtype=dtype, shardings=shardings, memory=memory, scheduler=scheduler)


def plan_shardings(spec: ModelSpec, plan: Plan) -> tuple[Sharding, Sharding]:
    """Stages balanced for what each phase does: the LM head runs on one token of a prompt, but at every step
    of decode. Ranks take the places that move least."""
    head = head_weight_in_layers(spec)
    if not plan.reshards:
        both = make_sharding(spec, plan.prefill, head_weight=head)
        return both, both
    prefill = make_sharding(spec, plan.prefill, head_weight=prefill_head_weight(spec))
    decode = make_sharding(spec, plan.decode, head_weight=head)
    return prefill, assign_ranks(spec, prefill, decode)
