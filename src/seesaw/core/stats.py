"""`EngineStats`: where an engine stands, for progress, summaries and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """One change of layout: where to, bytes copied from the host store (all ranks), seconds from the first
    rank's start to the last one's end, mode; bytes copied on the devices (all ranks), and the longest time that
    a rank spent on its copies."""

    target: str
    bytes: int
    seconds: float
    mode: str
    copied_bytes: int = 0
    moving_seconds: float = 0.0
    at: float = 0.0
    """Seconds from the engine's start to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoss:
    """A loss of ranks that the engine went on from."""

    reason: str
    """What happened, as a sentence."""
    ranks: tuple[int, ...]
    """Who was lost, as numbered under the plan before."""
    before: str
    after: str
    """Plans."""
    kept: int
    """Sequences that went on where they were: waiting, or whole in the host buffer."""
    restarted: int
    """Sequences that are computed again from their tokens."""
    seconds: float
    """From noticing it until the new ranks were ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Counts are since the engine started; bytes are bytes, times are seconds."""

    plan: str
    phase: str
    """`prefill`, `decode`, `mixed`, `transition` or `idle`."""
    requests_waiting: int
    requests_running: int
    requests_finished: int
    requests_failed: int
    prompt_tokens: int
    output_tokens: int
    elapsed_seconds: float
    seconds_per_phase: dict[str, float]
    """Time the engine waited for its ranks, by what they were doing (`prefill`, `decode`, `mixed`,
    `transition`)."""
    host_seconds: dict[str, float] = field(default_factory=dict)
    """Processor time of the control process's loop, likewise."""
    rank_host_seconds: dict[str, float] = field(default_factory=dict)
    """Time of a sampling rank that went to anything but the model, likewise."""
    steps: dict[str, int] = field(default_factory=dict)
    """Forwards completed, likewise."""
    phase_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens fed to these Forwards."""
    phase_sampled: dict[str, int] = field(default_factory=dict)
    """Tokens sampled by them."""
    phase_stepped: dict[str, int] = field(default_factory=dict)
    """Of the tokens fed, those of decode steps; the others are prompts."""
    phase_keys: dict[str, int] = field(default_factory=dict)
    """(query, key) pairs of their attention, in one layer that sees all tokens before."""
    phase_keys_read: dict[str, int] = field(default_factory=dict)
    """Of these pairs, those of decode steps, which read each key from memory."""
    wall_seconds: dict[str, float] = field(default_factory=dict)
    """All time while requests were served, by what the ranks were doing."""
    start_seconds: float = 0.0
    """From asking for the engine until its ranks were ready."""
    transitions: tuple[TransitionRecord, ...]
    rank_losses: tuple[RankLoss, ...] = ()
    swapped_out_bytes: int
    swapped_in_bytes: int
    preemptions_swapped: int
    preemptions_recomputed: int
    device_memory_peak_bytes: tuple[int, ...]
    """Per rank: weights at their most, activations, KV pool."""
    device_memory_budget_bytes: int
    host_kv_peak_bytes: int
    host_kv_budget_bytes: int
    host_kv_used_bytes: int = 0
    """Of the host buffer, at present."""
    device_kv_used_bytes: int = 0
    """Of the ranks' KV pools together, at present."""
    device_kv_pool_bytes: int = 0
    """Size of these pools under the present layout."""

    @property
    def prompt_tokens_fed(self) -> int:
        """Prompt tokens computed so far; `prompt_tokens` are those of requests that ended."""
        return sum(self.phase_tokens.values()) - sum(self.phase_stepped.values())

    @property
    def tokens_sampled(self) -> int:
        """Tokens generated so far; `output_tokens` are those of requests that ended."""
        return sum(self.phase_sampled.values())
