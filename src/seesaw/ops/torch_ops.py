"""The operators in plain torch: for every device and type, and the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from seesaw.ops.base import HeadNorms


class TorchOperators:
    """See `Operators`. Matrix products go to the vendor's library."""

    name = "torch"

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """See `Operators.linear`."""
        if out is None:
            return functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.rms_norm`."""
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Operators.add_rms_norm`."""
        return self.rms_norm(hidden.add_(delta), weight, eps)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None = None) -> Tensor:
        """See `Operators.rotate`."""
        if norms is not None:
            split = norms.q_heads
            for part, weight in ((heads[:, :split], norms.q_weight), (heads[:, split:], norms.k_weight)):
                part.copy_(self.rms_norm(part, weight, norms.eps))
        halves = heads.view(*heads.shape[:-1], 2, heads.shape[-1] // 2)
        wide = halves.float()
        turned = wide * cos[:, None, None]
        turned[:, :, 0].addcmul_(wide[:, :, 1], sin[:, None], value=-1)
        turned[:, :, 1].addcmul_(wide[:, :, 0], sin[:, None])
        halves.copy_(turned)
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Operators.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def join_columns(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Operators.join_columns`."""
        return torch.cat(list(parts), dim=1)

    def argmax(self, logits: Tensor) -> Tensor:
        """See `Operators.argmax`."""
        return logits.argmax(dim=-1)
