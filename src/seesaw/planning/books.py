"""Dividing a memory budget by what a plan demands of its ranks: blocks, what is left, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.core.units import format_bytes
from seesaw.planning.demand import MODES, Demand
from seesaw.planning.shapes import PlannedModel
from seesaw.weights.changes import Mode

Pair = tuple[int, int]
"""Of (prefill, decode)."""


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
    mode: Mode | None
    """How weights change over; None chooses `resident` if that leaves KV room enough, else `delta`."""


class Books:
    """A budget and what a model takes of it."""

    def __init__(self, model: PlannedModel, dtype: str, budget: MemoryBudget) -> None:
        self.model = model
        self.budget = budget
        self.host_blocks = budget.host_kv // (model.kv_bytes_per_token() * budget.block_size)
        self._tokens = max(budget.max_batch_tokens, budget.max_running) * DTYPE_BYTES[dtype]

    def workspace(self, rank: Demand) -> int:
        """Bytes for activations of one batch and for float32 logits."""
        running = 4 * self.budget.max_running
        return max(
            self._tokens * rank.width[0] + running * rank.logits[0],
            self._tokens * rank.width[1] + running * rank.logits[1],
        )

    def block_bytes(self, rank: Demand) -> Pair:
        """Bytes of a device block."""
        bits = self.budget.block_size * self.model.kv_bits
        return rank.kv[0] * bits // 8, rank.kv[1] * bits // 8

    def blocks(self, ranks: Iterable[Demand], mode: Mode) -> Pair:
        """Device blocks that every rank has room for; below 1 if one has none."""
        index = MODES.index(mode)
        found = []
        for rank in ranks:
            left = self.budget.device - rank.peaks[index] - self.workspace(rank)
            prefill, decode = self.block_bytes(rank)
            found.append((left // prefill, left // decode))
        return min(blocks for blocks, _ in found), min(blocks for _, blocks in found)

    def longest(self, blocks: Pair) -> int:
        """Longest sequence that fits every tier; 0 if none of two tokens does, or not the one asked for."""
        tiers = (*blocks, self.host_blocks) if self.budget.two_phases else blocks
        fits, wanted = min(tiers) * self.budget.block_size, self.budget.max_model_len
        if min(blocks) < 1 or (wanted is not None and wanted > fits):
            return 0
        longest = min(self.model.spec.max_position, fits if wanted is None else wanted)
        return longest if longest >= 2 else 0

    def capped(self, blocks: Pair) -> Pair:
        """No more than as many of the longest sequences as may run can fill."""
        enough = -(-self.longest(blocks) // self.budget.block_size) * self.budget.max_running
        return min(blocks[0], enough), min(blocks[1], enough)

    def refusal(self, ranks: Sequence[Demand], layouts: Sequence[Layout], mode: Mode) -> str:
        """Why a plan does not fit, with the arithmetic of the rank that has the least left."""
        budget, index = self.budget, MODES.index(mode)
        left = [budget.device - rank.peaks[index] - self.workspace(rank) for rank in ranks]
        number = left.index(min(left))
        rank = ranks[number]
        token = max(self.block_bytes(rank)) // budget.block_size
        wanted = budget.max_model_len or budget.block_size
        host = ""
        if budget.two_phases:
            host = (
                f"; the host buffer has room for {self.host_blocks * budget.block_size} tokens "
                f"({format_bytes(budget.host_kv)} at {format_bytes(self.model.kv_bytes_per_token())} each)"
            )
        how = f" ({mode} transitions)" if layouts[0] != layouts[1] else ""
        names = "->".join(dict.fromkeys(map(str, layouts)))
        return (
            f"plan {names} does not fit: of {format_bytes(budget.device)} device memory, rank {number} needs "
            f"{format_bytes(rank.peaks[index])} for weights{how} and {format_bytes(self.workspace(rank))} for "
            f"activations, which leaves {format_bytes(max(left[number], 0))} for KV at {format_bytes(token)} a "
            f"token, and a sequence of {wanted} tokens needs {format_bytes(wanted * token)}{host}; give more memory, "
            "a smaller max_model_len or chunk, or a plan with more ranks per replica"
        )
