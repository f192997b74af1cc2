"""The host buffer: one node-wide region of KV blocks in anonymous shared memory."""

from __future__ import annotations

import fcntl
import mmap
import os

import torch
from torch import Tensor

from seesaw.core.errors import ConfigError, MemoryBudgetError

Shape = tuple[int, int, int, int, int, int]


class HostBuffer:
    """Blocks `[blocks, layers, 2, kv_heads, block_size, head_dim]`, each for all layers and all KV heads.

    The process that creates it passes `fd` to the workers, which `attach`. The size is sealed: nobody can
    grow or shrink it, and `bytes` is exact. The system gives pages at first touch and takes them back once
    every process has closed its buffer and let go of the tensors made from it, however the processes end. The
    contents start as zeros.
    """

    def __init__(self, fd: int, shape: Shape, dtype: torch.dtype) -> None:
        """Map `fd`, which the buffer owns from here on. Use `create` or `attach`."""
        self.fd = fd
        self.bytes = _size(shape, dtype)
        self._tensor: Tensor | None = None
        try:
            self._tensor = _map(fd, shape, dtype)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, blocks: int, layers: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> HostBuffer:
        """Reserve a new buffer; `blocks` may be 0. Raises `MemoryBudgetError` if the system refuses."""
        shape = (blocks, layers, 2, kv_heads, block_size, head_dim)
        size = _size(shape, dtype)
        fd = os.memfd_create("seesaw-host-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise MemoryBudgetError(
                f"host buffer: {blocks} blocks ({size:,} bytes) cannot be reserved: {error}"
            ) from error
        return cls(fd, shape, dtype)

    @classmethod
    def attach(
        cls,
        fd: int,
        blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> HostBuffer:
        """Map a buffer that another process created with the same shape; `fd` stays the caller's.

        Raises `ConfigError` if its size is not that of the shape.
        """
        shape = (blocks, layers, 2, kv_heads, block_size, head_dim)
        size, wanted = os.fstat(fd).st_size, _size(shape, dtype)
        if size != wanted:
            raise ConfigError(f"host buffer: it has {size:,} bytes, blocks of shape {shape} need {wanted:,}")
        return cls(os.dup(fd), shape, dtype)

    @property
    def tensor(self) -> Tensor:
        """The whole buffer, shared with all processes that mapped it."""
        assert self._tensor is not None, "the host buffer is closed"
        return self._tensor

    def close(self) -> None:
        """Let go of the memory. It stays mapped while tensors made from `tensor` live. Idempotent."""
        self._tensor = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _size(shape: Shape, dtype: torch.dtype) -> int:
    elements = 1
    for extent in shape:
        assert extent >= 0, shape
        elements *= extent
    return elements * dtype.itemsize


def _map(fd: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    size = _size(shape, dtype)
    if size == 0:  # the host buffer is switched off
        return torch.empty(shape, dtype=dtype)
    try:
        region = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise MemoryBudgetError(f"host buffer: {size:,} bytes cannot be mapped: {error}") from error
    # the tensor holds the mapping; closing the mapping itself would pull the memory from under its views
    return torch.frombuffer(region, dtype=dtype).view(shape)
