"""Dividing a memory budget by what a plan demands of its ranks: blocks, what is left, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.core.units import format_bytes
from seesaw.core.workspace import logit_rows
from seesaw.planning.demand import MODES, Demand
from seesaw.planning.device_costs import HOST, DeviceCosts, Load, Parts
from seesaw.planning.shapes import PlannedModel
from seesaw.weights.changes import Mode

Pair = tuple[int, int]
"""Of (prefill, decode)."""
_NAMED = 4
"""Parts that a refusal names, the largest first."""


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
    costs: DeviceCosts = HOST
    """What the device takes beside the model."""


class Books:
    """A budget and what a model takes of it under a plan's layouts (prefill, decode)."""

    def __init__(
        self, model: PlannedModel, dtype: str, budget: MemoryBudget, layouts: tuple[Layout, Layout]
    ) -> None:
        self.model = model
        self.budget = budget
        self.host_blocks = budget.host_kv // (model.kv_bytes_per_token() * budget.block_size)
        self._tokens = max(budget.max_batch_tokens, budget.max_running) * DTYPE_BYTES[dtype]
        self._logits = 4 * min(budget.max_running, logit_rows(model.spec.vocab))
        self._load = Load(
            layouts=layouts,
            element=DTYPE_BYTES[dtype],
            batch_tokens=budget.max_batch_tokens,
            running=budget.max_running,
            sequence_blocks=-(-(budget.max_model_len or model.spec.max_position) // budget.block_size),
            head_dim=model.spec.head_dim,
        )
        self._shared = budget.costs.shared(self._load)
        self._shared_bytes = sum(size for _, size in self._shared)

    def parts(self, rank: Demand, mode: Mode) -> Parts:
        """What a rank takes beside weights and KV: activations of one batch, the float32 logits of as many rows as
        are computed at once, and what the device takes; parts that take nothing are left out."""
        costs = self.budget.costs
        phases = zip(rank.width, rank.logits, strict=True)
        activations, logits = max(((self._tokens * w, self._logits * n) for w, n in phases), key=sum)
        sizes = {"activations": activations, "logits": logits}
        sizes |= dict((*self._shared, *costs.own(rank, self._load)))
        sizes["allocator"] += costs.churned(rank, mode)
        return tuple((name, size) for name, size in sizes.items() if size)

    def workspace(self, rank: Demand, mode: Mode) -> int:
        """Bytes of all `parts`."""
        return self._lasting(rank) + self.budget.costs.churned(rank, mode)

    def _lasting(self, rank: Demand) -> int:
        """Of the workspace, what does not go by the mode of transition."""
        width, logits = rank.width, rank.logits
        prefill = self._tokens * width[0] + self._logits * logits[0]
        decode = self._tokens * width[1] + self._logits * logits[1]
        (_, graphs), (_, attention), (_, allocator) = self.budget.costs.own(rank, self._load)
        return max(prefill, decode) + self._shared_bytes + graphs + attention + allocator

    def left(self, rank: Demand, mode: Mode) -> int:
        """Bytes of the budget for KV: what neither weights nor workspace take. Below 0 if they do not fit."""
        return self.budget.device - rank.peaks[MODES.index(mode)] - self.workspace(rank, mode)

    def block_bytes(self, rank: Demand) -> Pair:
        """Bytes of a device block."""
        bits = self.budget.block_size * self.model.kv_bits
        return rank.kv[0] * bits // 8, rank.kv[1] * bits // 8

    def room(self, ranks: Iterable[Demand], modes: Sequence[Mode]) -> dict[Mode, Pair]:
        """Device blocks that every rank has room for, by mode; below 1 if one has none."""
        found: dict[Mode, list[Pair]] = {mode: [] for mode in modes}
        for rank in ranks:
            lasting = self.budget.device - self._lasting(rank)
            prefill, decode = self.block_bytes(rank)
            for mode, blocks in found.items():
                left = lasting - rank.peaks[MODES.index(mode)] - self.budget.costs.churned(rank, mode)
                blocks.append((left // prefill, left // decode))
        return {
            mode: (min(p for p, _ in blocks), min(d for _, d in blocks)) for mode, blocks in found.items()
        }

    def blocks(self, ranks: Iterable[Demand], mode: Mode) -> Pair:
        """`room` with one mode."""
        return self.room(ranks, (mode,))[mode]

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
        """Why a plan does not fit, with the arithmetic of the rank that lacks most."""
        budget = self.budget
        wanted = budget.max_model_len or budget.block_size
        blocks = -(-wanted // budget.block_size)
        over = [self.left(rank, mode) - blocks * max(self.block_bytes(rank)) for rank in ranks]
        number = over.index(min(over))
        rank, left = ranks[number], self.left(ranks[number], mode)
        token = max(self.block_bytes(rank)) // budget.block_size
        host = ""
        if budget.two_phases:
            host = (
                f"; the host buffer has room for {self.host_blocks * budget.block_size} tokens "
                f"({format_bytes(budget.host_kv)} at {format_bytes(self.model.kv_bytes_per_token())} each)"
            )
        names = "->".join(dict.fromkeys(map(str, layouts)))
        return (
            f"plan {names} does not fit: of {format_bytes(budget.device)} device memory, rank {number} needs "
            f"{self._needs(rank, mode, layouts)}, which leaves {format_bytes(max(left, 0))} for KV at "
            f"{format_bytes(token)} a token, and a sequence of {wanted} tokens needs {format_bytes(wanted * token)}"
            f"{host}; give more memory, a smaller max_model_len or chunk, or a plan with more ranks per replica"
        )

    def _needs(self, rank: Demand, mode: Mode, layouts: Sequence[Layout]) -> str:
        """Weights and workspace in words, the largest parts by name."""
        how = f" ({mode} transitions)" if layouts[0] != layouts[1] else ""
        weights = (f"weights{how}", rank.peaks[MODES.index(mode)])
        first, *others = sorted(self.parts(rank, mode), key=lambda part: -part[1])
        named, rest = [weights, first, *others[: _NAMED - 2]], others[_NAMED - 2 :]
        if rest:
            named.append((f"{len(rest)} smaller parts", sum(size for _, size in rest)))
        words = [f"{format_bytes(size)} for {name}" for name, size in named]
        return f"{', '.join(words[:-1])} and {words[-1]}"
