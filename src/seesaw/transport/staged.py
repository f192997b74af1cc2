"""`StagedTransport`: ranks on devices that cannot talk to each other, through host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from seesaw.transport.base import Members, Transport

_HOST = torch.device("cpu")


class StagedTransport:
    """Brings tensors to the host, gives them to a transport there, and takes the results back; see `Transport`.

    For several ranks on one GPU, which NCCL refuses, and for nodes whose GPUs cannot reach each other. Every call
    waits for the device, so this is for trying things out, not for speed.
    """

    capturable = False

    def __init__(self, inner: Transport) -> None:
        """Owns `inner`."""
        self._inner = inner
        self.name = f"{inner.name}, staged"

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""
        return x if len(members) == 1 else x.copy_(self._inner.all_reduce(_staged(x), members))

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`."""
        parts = self._inner.gather(_staged(x), members)
        return None if parts is None else [part.to(x.device) for part in parts]

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        return x if len(members) == 1 else x.copy_(self._inner.broadcast(_staged(x), members))

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`."""
        self._inner.send(_staged(x), rank, channel)

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`."""
        return x.copy_(self._inner.receive(torch.empty_like(x, device=_HOST), rank, channel))

    def flush(self) -> None:
        """See `Transport.flush`."""
        self._inner.flush()

    def close(self) -> None:
        """See `Transport.close`."""
        self._inner.close()


def _staged(x: Tensor) -> Tensor:
    """A copy of `x` in host memory, whole when this returns."""
    return torch.empty_like(x, device=_HOST).copy_(x)
