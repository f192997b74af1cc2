"""`MoESpec`: the feed-forward layers of a mixture-of-experts decoder, as the planner prices them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from seesaw.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """The experts of a decoder. Stands beside a `ModelSpec`, which describes everything else.

    A sparse layer has a router, `experts` feed-forward networks of `expert_ffn` columns of which each token
    passes `experts_per_token`, and, if `shared_ffn` is not 0, one more of that width which every token passes.
    The other layers are dense, with the `ffn` of the `ModelSpec`. Raises `ConfigError`.
    """

    experts: int
    experts_per_token: int
    expert_ffn: int
    shared_ffn: int = 0
    sparse: tuple[int, ...]
    """Numbers of the sparse layers, from 0, rising."""

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} of experts={self.experts}: "
                "a token passes at least one expert and at most all"
            )
        if not self.sparse or self.sparse[0] < 0 or any(a >= b for a, b in pairwise(self.sparse)):
            raise ConfigError(
                f"sparse={self.sparse}: expected layer numbers from 0, rising, and at least one"
            )

    @property
    def sparse_layers(self) -> int:
        """How many layers are sparse."""
        return len(self.sparse)

    def expected_experts(self, tokens: float) -> float:
        """Experts of a sparse layer that at least one of `tokens` tokens passes, on average.

        Every token draws its k of E experts uniformly and independently, so that one expert is missed by one
        token with probability 1 - k/E: `E * (1 - (1 - k/E)^tokens)`.
        """
        missed: float = (1.0 - self.experts_per_token / self.experts) ** tokens
        return self.experts * (1.0 - missed)
