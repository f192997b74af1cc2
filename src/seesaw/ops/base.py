"""The protocol of operator backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of queries and keys that some families apply per head before the rotation."""

    q_weight: Tensor
    """`[head_dim]`, for the first `q_heads` heads."""
    k_weight: Tensor
    """`[head_dim]`, for the others."""
    q_heads: int
    eps: float


class Operators(Protocol):
    """What a decoder layer does between attention and collectives.

    Tensors are float32, bfloat16 or float16, all of one call of the same type; matrices are row-major with
    contiguous rows. Sums, norms and rotations are computed in float32 and rounded once, at the end. A result is
    the same for the same inputs, whatever ran before; a row of it may differ in its last bits with the number of
    rows beside it.
    """

    name: str

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """`x @ weight.T + bias`: `[M, K]` by `[N, K]` gives `[M, N]`, contiguous; into `out` if given."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x²) + eps) * weight` over the last dimension of `x` `[M, K]`."""
        ...

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to `hidden` in place (both `[M, K]`), and return the norm of the sum."""
        ...

    def rotate(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Rotary embedding of `heads` `[M, H, head_dim]` (rows may be strided), in place; returns `heads`.

        `cos` and `sin` are float32 `[M, head_dim / 2]`; channel i pairs with channel `i + head_dim / 2` (the
        rotate-half convention): `a·cos - b·sin` and `b·cos + a·sin`. With `norms` each head is first divided
        by its root mean square and multiplied by its weight, rounded to the heads' type, then rotated.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` `[M, F]` of `[M, 2F]`, gate first."""
        ...

    def join_columns(self, parts: Sequence[Tensor]) -> Tensor:
        """The matrices `[M, N_i]` side by side: `[M, N]`. They are contiguous, and lie one behind the other."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """Column of the largest element of each row, int64 `[M]` of `[M, N]`.

        The lowest of equals; in a row with a NaN, the first NaN.
        """
        ...
