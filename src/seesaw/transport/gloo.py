"""`GlooTransport`: `torch.distributed`, where there is no native library."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seesaw.transport.base import Link, Members
from seesaw.transport.torch_distributed import TorchDistributed


class GlooTransport(TorchDistributed):
    """One rank's end of Gloo's process groups; see `Transport`. One at a time in a process.

    Everything but integer sums moves as bytes, and floats are added up here rather than by Gloo, whose order is
    its own: so a sum has the same bits as with every other transport, at the price of more traffic between
    three ranks and more.
    """

    name = _backend = "gloo"
    _patience = timedelta(days=1)
    """A rank that is lost breaks its connections, and shows at once; one that is slow is waited for."""

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""
        if len(members) > 1 and x.numel():
            group = self._group(members)
            if not x.is_floating_point():
                dist.all_reduce(x, group=group)
                return x
            parts = {rank: torch.empty_like(x) for rank in sorted(members)}
            dist.all_gather([self._wire(part) for part in parts.values()], self._wire(x), group=group)
            exact = torch.promote_types(x.dtype, torch.float32)
            total = parts[members[0]].to(exact)
            for rank in members[1:]:
                total += parts[rank]
            x.copy_(total)
        return x

    def _way(self, link: Link) -> tuple[Any, int]:
        return None, link[2] + 1

    def _wire(self, x: Tensor) -> Tensor:
        """The memory of `x`; Gloo does not know every type."""
        assert x.is_contiguous(), x.stride()
        return x.view(-1).view(torch.uint8)
