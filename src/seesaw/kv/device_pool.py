"""The device pool: a rank's paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from seesaw.core.errors import MemoryBudgetError
from seesaw.device.host_memory import reserve


class DevicePool:
    """A flat arena of bytes that is viewed anew as KV blocks after every transition.

    Blocks are `[local_layers, 2, local_kv_heads, block_size, head_dim]` of this rank's layers and KV heads.
    The arena is never reallocated; a new view sees whatever bytes the old one left.
    """

    def __init__(self, arena_bytes: int, device: torch.device | None = None) -> None:
        """Reserve `arena_bytes` bytes on `device`, by default in host memory, where pages come at first touch.

        Raises `MemoryBudgetError` if the system refuses.
        """
        self.arena_bytes = arena_bytes
        on_host = device is None or device.type == "cpu"
        self._arena = _reserve(arena_bytes) if on_host else _allocate(arena_bytes, device)
        self._blocks: Tensor | None = None
        self._layers: tuple[Tensor, ...] = ()

    def view(
        self,
        blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """View the arena as `[blocks, layers, 2, kv_heads, block_size, head_dim]` from now on."""
        shape = (blocks, layers, 2, kv_heads, block_size, head_dim)
        size = torch.Size(shape).numel() * dtype.itemsize
        assert size <= self.arena_bytes, f"{shape} of {dtype}: {size} bytes of {self.arena_bytes}"
        self._blocks = self._arena[:size].view(dtype).view(shape)
        self._layers = tuple(self._blocks[:, layer] for layer in range(layers))
        return self._blocks

    @property
    def blocks(self) -> Tensor:
        """The present view."""
        assert self._blocks is not None, "the pool has no view yet"
        return self._blocks

    def layer(self, index: int) -> Tensor:
        """Layer `index` from the rank's first: `[blocks, 2, kv_heads, block_size, head_dim]`, strided."""
        return self._layers[index]


def _allocate(size: int, device: torch.device | None) -> Tensor:
    """Memory of an accelerator. Zeroed: kernels may load what no sequence has written, and then mask it out."""
    try:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"device pool: {size:,} bytes cannot be reserved on {device}: {error}"
        ) from error


def _reserve(size: int) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(reserve(size, "device pool"), dtype=torch.uint8)
