"""Copies of KV between a rank's device pool and the host buffer: re-sharding KV is just these slices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from seesaw.native.build import load

BlockPairs = Sequence[tuple[int, int]] | Tensor
"""(device block, host block) pairs; as a tensor int64 `[n, 2]`, which saves a conversion per layer."""


def swap_out(
    pool: Tensor,
    host: Tensor,
    pairs: BlockPairs,
    *,
    layers: range,
    kv_heads: range,
    layer: int | None = None,
) -> int:
    """Copy blocks from the device pool to the host buffer; returns the number of bytes.

    `pool` is the rank's `[blocks, len(layers), 2, len(kv_heads), block_size, head_dim]`, `host` the buffer's
    `[blocks, all layers, 2, all KV heads, block_size, head_dim]` of the same type. `layers` and `kv_heads`
    are the global ranges that the rank holds. With `layer` (a global number) only that layer is copied. The
    device blocks must not change meanwhile. Releases the GIL.
    """
    return _copy(pool, host, pairs, layers=layers, kv_heads=kv_heads, layer=layer, to_host=True)


def swap_in(
    pool: Tensor,
    host: Tensor,
    pairs: BlockPairs,
    *,
    layers: range,
    kv_heads: range,
    layer: int | None = None,
) -> int:
    """Copy blocks from the host buffer to the device pool. Arguments and result as for `swap_out`."""
    return _copy(pool, host, pairs, layers=layers, kv_heads=kv_heads, layer=layer, to_host=False)


class _CopySlabs(Protocol):
    def __call__(
        self,
        device: int,
        host: int,
        pairs: int,
        count: int,
        slabs: int,
        bytes: int,
        device_block_stride: int,
        device_slab_stride: int,
        host_block_stride: int,
        host_slab_stride: int,
        device_blocks: int,
        host_blocks: int,
        to_host: int,
        /,
    ) -> int: ...


def _copy(
    pool: Tensor,
    host: Tensor,
    pairs: BlockPairs,
    *,
    layers: range,
    kv_heads: range,
    layer: int | None,
    to_host: bool,
) -> int:
    _check(pool, host, layers, kv_heads, layer)
    table = pairs if isinstance(pairs, Tensor) else torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    assert table.dtype == torch.int64 and table.shape[1:] == (2,) and table.is_contiguous(), table.shape
    if not len(table):
        return 0
    first, count = (layers.start, len(layers)) if layer is None else (layer, 1)
    near = pool[:, first - layers.start : first - layers.start + count]
    far = host[:, first : first + count, :, kv_heads.start : kv_heads.stop]
    kernel = _kernel()
    if kernel is None:
        _copy_by_indexing(near, far, table, to_host)
    else:
        _copy_by_kernel(kernel, near, far, table, to_host)
    return len(table) * near[0].numel() * near.element_size()


def _copy_by_kernel(kernel: _CopySlabs, near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
    # K and V of one layer are as far apart as V and the next layer's K, so slabs lie at even distances
    item = near.element_size()
    wrong = kernel(
        near.data_ptr(),
        far.data_ptr(),
        table.data_ptr(),
        len(table),
        2 * near.shape[1],
        near[0, 0, 0].numel() * item,
        near.stride(0) * item,
        near.stride(2) * item,
        far.stride(0) * item,
        far.stride(2) * item,
        len(near),
        len(far),
        int(to_host),
    )
    assert wrong < 0, f"blocks {table[wrong].tolist()} of pools of {len(near)} and {len(far)}"


def _copy_by_indexing(near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
    device_blocks, host_blocks = table.unbind(1)
    assert (
        int(table.min()) >= 0 and int(device_blocks.max()) < len(near) and int(host_blocks.max()) < len(far)
    )
    if to_host:
        far[host_blocks] = near[device_blocks]
    else:
        near[device_blocks] = far[host_blocks]


def _check(pool: Tensor, host: Tensor, layers: range, kv_heads: range, layer: int | None) -> None:
    """The kernel copies by these shapes."""
    assert pool.is_contiguous() and host.is_contiguous()
    assert pool.dtype == host.dtype, (pool.dtype, host.dtype)
    assert pool.shape[1:] == (len(layers), 2, len(kv_heads), *host.shape[4:]), (pool.shape, layers, kv_heads)
    assert layers.step == kv_heads.step == 1 and layers.start >= 0 and layers.stop <= host.shape[1], layers
    assert kv_heads.start >= 0 and kv_heads.stop <= host.shape[3], kv_heads
    assert layer is None or layer in layers, (layer, layers)


def _kernel() -> _CopySlabs | None:
    library = load()
    return None if library is None else _bind(library)


@cache
def _bind(library: ctypes.CDLL) -> _CopySlabs:
    function = library.seesaw_copy_slabs
    function.argtypes = (*(ctypes.c_void_p,) * 3, *(ctypes.c_int64,) * 9, ctypes.c_int32)
    function.restype = ctypes.c_int64
    return function
