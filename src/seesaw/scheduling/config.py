"""What the scheduler knows of the plan: counts only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan

PolicyName = Literal["seesaw", "chunked", "prefill-first", "decode-first"]
POLICIES: tuple[str, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCosts:
    """What the planner expects of decode steps and of turning back to prefill, in seconds."""

    step: float
    """A decode step, however few sequences it has."""
    turn: float
    """Going over to prefill and back, apart from the work done there: transitions, pipelines that fill and empty."""
    block: float
    """Swapping a KV block out and in again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits within which the scheduler works. Pairs are (prefill, decode); a static plan repeats itself."""

    plan: Plan
    policy: PolicyName
    block_size: int
    """Tokens per KV block."""
    device_blocks: tuple[int, int]
    """Blocks in the device pool of one replica."""
    host_blocks: int
    """Blocks in the host buffer; 0 switches it off (then preemption recomputes)."""
    max_model_len: int
    """Most tokens of a sequence, prompt included."""
    max_batch_tokens: int
    """Most tokens fed by one Forward that holds prefill; the chunk size of policy `chunked`."""
    max_running: int
    """Most sequences resident on one replica."""
    micro_batches: tuple[int, int] | None = None
    """Groups of sequences that take turns in the pipeline of a replica; None: one for each stage."""
    overlap: bool = True
    """Keep further Forwards in flight instead of waiting for each."""
    refill_threshold: float = 0.5
    """Policy `seesaw` turns back to prefill once the host buffer is empty and at most this share of the
    phase's largest batch still decodes; without `turn_costs`."""
    turn_costs: TurnCosts | None = None
    """With them, `seesaw` turns back when the steps of a thin batch waste more than turning costs."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.policy == "seesaw" and not self.plan.separate:
            plan = self.plan
            raise ConfigError(f"policy seesaw needs two phases: write the plan {plan} as {plan}->{plan}")
        if self.policy == "chunked" and self.plan.separate:
            raise ConfigError(
                f"policy chunked mixes both phases under one layout and cannot run plan {self.plan}; "
                f"write a static plan such as {self.plan.decode}"
            )
        if self.micro_batches is not None and min(self.micro_batches) < 1:
            raise ConfigError(f"micro_batches={self.micro_batches}: at least 1 in each phase")
        for name in ("block_size", "max_model_len", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")

    def groups(self, phase: int) -> int:
        """Micro-batch groups of a replica."""
        if self.micro_batches is not None:
            return self.micro_batches[phase]
        return (self.plan.prefill, self.plan.decode)[phase].pp

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)
