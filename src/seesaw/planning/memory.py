"""The exact memory of a plan: what each rank holds, how many KV blocks that leaves, and whether it fits.

The figures come from the interval and block arithmetic the engine itself uses, so a plan that is accepted
allocates what is written here and no more.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.core.units import format_bytes
from seesaw.weights.sharding import Sharding, plan_peak_bytes, rank_view, weight_bytes

TransitionMode = Literal["resident", "delta", "reload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Limits and wishes. Bytes are per rank (`device`) and per node (`host_kv`)."""

    device: int
    host_kv: int
    block_size: int
    max_batch_tokens: int
    max_running: int
    max_model_len: int | None
    """Tokens that one sequence must be able to reach; None takes what fits, up to the model's own limit."""
    two_phases: bool
    """Whether every sequence passes through the host buffer."""
    mode: TransitionMode | None
    """How weights change over; None chooses `resident` if that leaves KV room enough, else `delta`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is allocated. Pairs are (prefill, decode)."""

    mode: TransitionMode
    weights: tuple[int, ...]
    """Most bytes of weights that each rank holds at any time, transitions included."""
    workspace: tuple[int, ...]
    """Bytes set aside on each rank for activations and logits."""
    pool: tuple[int, ...]
    """Bytes of each rank's KV pool."""
    device_blocks: tuple[int, int]
    """KV blocks of a replica."""
    host_blocks: int
    max_model_len: int


def plan_memory(spec: ModelSpec, shardings: Seq[Sharding], dtype: str, budget: MemoryBudget) -> MemoryPlan:
    """Divide the budgets. `shardings` are (prefill, decode), twice the same where nothing is re-sharded.

    Raises `MemoryBudgetError` with the arithmetic if the weights, or one sequence's KV, do not fit.
    """
    modes: list[TransitionMode] = [budget.mode] if budget.mode else ["resident", "delta", "reload"]
    if shardings[0] == shardings[1]:
        modes = [budget.mode or "resident"]
    plans: list[MemoryPlan] = []
    refusal: MemoryBudgetError | None = None
    for mode in modes:
        try:
            plans.append(_plan(spec, shardings, dtype, budget, mode))
        except MemoryBudgetError as error:
            refusal = error
    if not plans:
        assert refusal is not None
        raise refusal
    return _roomiest(plans)


def _roomiest(plans: list[MemoryPlan]) -> MemoryPlan:
    """The first mode (the one that moves least) that gives up no more than a fifth of the KV room."""
    most = max(min(plan.device_blocks) for plan in plans)
    return next(plan for plan in plans if min(plan.device_blocks) >= 0.8 * most)


def _plan(
    spec: ModelSpec, shardings: Seq[Sharding], dtype: str, budget: MemoryBudget, mode: TransitionMode
) -> MemoryPlan:
    ranks = range(shardings[0].layout.world)
    weights = tuple(_peak_weights(spec, shardings, dtype, mode, rank) for rank in ranks)
    workspace = tuple(_workspace(spec, shardings, dtype, budget, rank) for rank in ranks)
    blocks = [
        min(
            (budget.device - weights[rank] - workspace[rank])
            // _block_bytes(spec, sharding, dtype, budget, rank)
            for rank in ranks
        )
        for sharding in shardings
    ]
    host_block = spec.kv_bytes_per_token(dtype) * budget.block_size
    host_blocks = budget.host_kv // host_block
    longest = _longest(spec, budget, [*blocks, host_blocks] if budget.two_phases else blocks)
    if min(blocks) < 1 or longest < 2:
        raise MemoryBudgetError(
            _refusal(spec, shardings, dtype, budget, mode, weights, workspace, host_blocks)
        )
    enough = -(-longest // budget.block_size) * budget.max_running
    device_blocks = (min(blocks[0], enough), min(blocks[1], enough))
    pool = tuple(
        max(
            n * _block_bytes(spec, s, dtype, budget, rank)
            for s, n in zip(shardings, device_blocks, strict=True)
        )
        for rank in ranks
    )
    return MemoryPlan(
        mode=mode,
        weights=weights,
        workspace=workspace,
        pool=pool,
        device_blocks=device_blocks,
        host_blocks=host_blocks,
        max_model_len=longest,
    )


def _longest(spec: ModelSpec, budget: MemoryBudget, tiers: list[int]) -> int:
    """Longest sequence that fits every tier, given their blocks; 0 if the one asked for does not."""
    fits = min(tiers) * budget.block_size
    wanted = budget.max_model_len
    if wanted is None:
        return min(spec.max_position, fits)
    return min(wanted, spec.max_position) if wanted <= fits else 0


def _peak_weights(
    spec: ModelSpec, shardings: Seq[Sharding], dtype: str, mode: TransitionMode, rank: int
) -> int:
    first, second = shardings
    start = weight_bytes(spec, first, rank, dtype)
    if first == second:
        return start
    there = plan_peak_bytes(spec, first, second, mode=mode, dtype=dtype, rank=rank)
    back = plan_peak_bytes(spec, second, first, mode=mode, dtype=dtype, rank=rank)
    return max(start, there, back)


def _block_bytes(spec: ModelSpec, sharding: Sharding, dtype: str, budget: MemoryBudget, rank: int) -> int:
    view = rank_view(spec, sharding, rank)
    elements = 2 * len(view.layers) * len(view.kv_heads) * spec.head_dim * budget.block_size
    return elements * DTYPE_BYTES[dtype]


def _workspace(spec: ModelSpec, shardings: Seq[Sharding], dtype: str, budget: MemoryBudget, rank: int) -> int:
    """Activations of one batch at their widest, and the float32 logits of the rank that samples."""
    most = 0
    tokens = max(budget.max_batch_tokens, budget.max_running)
    for sharding in shardings:
        view = rank_view(spec, sharding, rank)
        heads = (len(view.q_heads) + 2 * len(view.kv_heads)) * spec.head_dim
        width = 4 * spec.hidden + max(3 * heads, 3 * len(view.ffn))
        logits = 0
        if view.last_stage:
            columns = len(view.vocab) + (2 * spec.vocab if rank == view.sampler_rank else 0)
            logits = budget.max_running * columns * 4
        most = max(most, tokens * width * DTYPE_BYTES[dtype] + logits)
    return most


def _refusal(
    spec: ModelSpec,
    shardings: Seq[Sharding],
    dtype: str,
    budget: MemoryBudget,
    mode: TransitionMode,
    weights: tuple[int, ...],
    workspace: tuple[int, ...],
    host_blocks: int,
) -> str:
    left = [budget.device - w - s for w, s in zip(weights, workspace, strict=True)]
    rank = left.index(min(left))
    token = max(_block_bytes(spec, s, dtype, budget, rank) for s in shardings) // budget.block_size
    wanted = budget.max_model_len or budget.block_size
    host = ""
    if budget.two_phases:
        node = spec.kv_bytes_per_token(dtype)
        host = (
            f"; the host buffer has room for {host_blocks * budget.block_size} tokens "
            f"({format_bytes(budget.host_kv)} at {format_bytes(node)} each)"
        )
    how = f" ({mode} transitions)" if shardings[0] != shardings[1] else ""
    names = "->".join(dict.fromkeys(str(s.layout) for s in shardings))
    return (
        f"plan {names} does not fit: of {format_bytes(budget.device)} device memory, rank {rank} needs "
        f"{format_bytes(weights[rank])} for weights{how} and {format_bytes(workspace[rank])} for "
        f"activations, which leaves {format_bytes(max(left[rank], 0))} for KV at {format_bytes(token)} a token, and "
        f"a sequence of {wanted} tokens needs {format_bytes(wanted * token)}{host}; give more memory, a smaller "
        "max_model_len or chunk, or a plan with more ranks per replica"
    )
