"""The exact memory of a plan: what each rank holds, how many KV blocks that leaves, and whether it fits.

The figures come from the interval and block arithmetic the engine itself uses (`planning.demand`), so a plan that is
accepted allocates what is written here and no more. For every rank, with the mode of transition that was chosen,

    weights + workspace + pool <= device memory,

where `weights` is the most that both phases and both ways of changing over ever hold, `workspace` the sum of `parts`
(activations, logits, and what the device takes: `planning.device_costs`), each the larger one of the two phases, and
`pool` the KV blocks of the phase that has more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.layout import Layout, Plan
from seesaw.core.units import format_bytes
from seesaw.planning.books import Books, MemoryBudget, Pair
from seesaw.planning.demand import MODES, Bounds, bounds, demands, distinct_demands
from seesaw.planning.device_costs import Parts
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.shardings import Stages, footprint, plan_shardings
from seesaw.weights.changes import Mode
from seesaw.weights.sharding import Sharding

__all__ = ["MemoryBudget", "MemoryPlan", "TransitionMode", "estimate_memory", "footprint", "plan_memory"]

TransitionMode = Mode
ENOUGH_ROOM = 0.8
"""Of the most KV room that any way of changing over leaves: one that moves less may give up the rest."""
EXACT_RANKS = 8
"""Up to so many, `estimate_memory` is exact for all layouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is allocated. Pairs are (prefill, decode)."""

    mode: TransitionMode
    weights: tuple[int, ...]
    """Most bytes of weights that each rank holds at any time, transitions included."""
    workspace: tuple[int, ...]
    """Bytes set aside on each rank for everything but weights and KV."""
    pool: tuple[int, ...]
    """Bytes of each rank's KV pool."""
    device_blocks: tuple[int, int]
    """KV blocks of a replica."""
    host_blocks: int
    max_model_len: int
    parts: tuple[Parts, ...]
    """What the workspace of each rank is made of, in bytes by name."""

    @property
    def fullest(self) -> int:
        """The rank that takes most."""
        whole = [sum(taken) for taken in zip(self.weights, self.workspace, self.pool, strict=True)]
        return whole.index(max(whole))

    def components(self, rank: int) -> Parts:
        """All that a rank takes: weights, KV pool, and the parts of its workspace."""
        return (("weights", self.weights[rank]), ("KV pool", self.pool[rank]), *self.parts[rank])

    def describe(self, rank: int) -> str:
        """`components` in words, the largest first."""
        ordered = sorted(self.components(rank), key=lambda part: -part[1])
        return ", ".join(f"{format_bytes(size)} {name}" for name, size in ordered)


def plan_memory(
    model: PlannedModel, shardings: tuple[Sharding, Sharding], dtype: str, budget: MemoryBudget
) -> MemoryPlan:
    """Divide the budgets. `shardings` are (prefill, decode), twice the same where nothing is re-sharded; `dtype` is
    that of activations.

    Raises `MemoryBudgetError` with the arithmetic if the weights, or one sequence's KV, do not fit.
    """
    layouts = shardings[0].layout, shardings[1].layout
    ranks, books = demands(model, shardings), Books(model, dtype, budget, layouts)
    modes = _modes(budget, reshards=shardings[0] != shardings[1])
    room = books.room(ranks, modes)
    fitting = _fitting(books, room)
    if not fitting:
        raise MemoryBudgetError(books.refusal(ranks, layouts, modes[-1]))
    mode = _least_moving(fitting)
    blocks, parts = fitting[mode], tuple(books.parts(rank, mode) for rank in ranks)
    return MemoryPlan(
        mode=mode,
        weights=tuple(rank.peaks[MODES.index(mode)] for rank in ranks),
        workspace=tuple(sum(size for _, size in of_rank) for of_rank in parts),
        pool=tuple(
            max(count * size for count, size in zip(blocks, books.block_bytes(rank), strict=True))
            for rank in ranks
        ),
        device_blocks=blocks,
        host_blocks=books.host_blocks,
        max_model_len=books.longest(room[mode]),
        parts=parts,
    )


def estimate_memory(
    model: PlannedModel,
    prefill: Layout,
    decode: Layout,
    dtype: str,
    budget: MemoryBudget,
    stages: Stages | None = None,
) -> Pair | str:
    """KV blocks of a replica in each phase, or why the plan does not fit: `plan_memory` for searches, in some tens
    of microseconds once it has met both layouts.

    Exact for nodes of up to `EXACT_RANKS`, and where both layouts have one degree of tensor parallelism. For others
    no rank is given a place: each is held to have the most of everything that any has, so that the answer errs to
    fewer blocks. `stages` are the layers of each pipeline stage of both, if they are not to be balanced. Raises
    `LayoutError`.
    """
    books = Books(model, dtype, budget, (prefill, decode))
    modes = _modes(books.budget, reshards=prefill != decode)
    if prefill.tp == decode.tp or prefill.world <= EXACT_RANKS:
        plan = Plan(prefill, decode, separate=True)
        ranks = distinct_demands(model, plan_shardings(model, plan, stages))
        fitting = _fitting(books, books.room(ranks, modes))
        return (
            fitting[_least_moving(fitting)] if fitting else books.refusal(ranks, (prefill, decode), modes[-1])
        )
    between = bounds(model, prefill, decode, stages)
    return _estimate_between(books, between, modes) or books.refusal(
        (between.most,), (prefill, decode), modes[-1]
    )


def _estimate_between(books: Books, between: Bounds, modes: Sequence[Mode]) -> Pair | None:
    """No more than what `plan_memory` finds, which lies between the bounds."""
    fitting = _fitting(books, books.room((between.most,), modes))
    if not fitting:
        return None
    mode = _least_moving(fitting)
    if mode == "resident" or "resident" not in modes:
        return fitting[mode]
    resident = books.blocks((between.least,), "resident")
    if min(books.capped(resident)) < ENOUGH_ROOM * min(fitting[mode]):
        return fitting[mode]
    # Both shardings may stay after all, and then leave no more room than that asks for.
    prefill, decode = (int(ENOUGH_ROOM * blocks) for blocks in fitting[mode])
    return prefill, decode


def _modes(budget: MemoryBudget, *, reshards: bool) -> Sequence[Mode]:
    """Those to choose from, the one that moves least first."""
    if budget.mode:
        return (budget.mode,)
    return MODES if reshards else MODES[:1]


def _fitting(books: Books, room: dict[Mode, Pair]) -> dict[Mode, Pair]:
    """Device blocks by the modes that leave room for a sequence."""
    return {mode: books.capped(blocks) for mode, blocks in room.items() if books.longest(blocks)}


def _least_moving(fitting: dict[Mode, Pair]) -> Mode:
    """The first mode (the one that moves least) that gives up no more than a fifth of the KV room."""
    most = max(map(min, fitting.values()))
    return next(mode for mode, blocks in fitting.items() if min(blocks) >= ENOUGH_ROOM * most)
