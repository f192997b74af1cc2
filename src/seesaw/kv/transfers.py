"""Copies of KV between a rank's device pool and the host buffer: re-sharding KV is just these slices."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from seesaw.native.build import load
from seesaw.native.triton_here import missing_for_triton

logger = logging.getLogger(__name__)

BlockPairs = Sequence[tuple[int, int]] | Tensor
"""(device block, host block) pairs; as a tensor int64 `[n, 2]`, which saves a conversion per layer.

A tensor on a GPU, as `block_table` makes it, is taken as checked.
"""
SlabCopy = Callable[[Tensor, Tensor, Tensor, bool], None]
"""As `copy_slabs`: how the slabs of a pool on a GPU get to the host buffer (True) and back."""


def swap_out(
    pool: Tensor,
    host: Tensor,
    pairs: BlockPairs,
    *,
    layers: range,
    kv_heads: range,
    layer: int | None = None,
    copy: SlabCopy | None = None,
) -> int:
    """Copy blocks from the device pool to the host buffer; returns the number of bytes.

    `pool` is the rank's `[blocks, len(layers), 2, len(kv_heads), block_size, head_dim]`, `host` the buffer's
    `[blocks, all layers, 2, all KV heads, block_size, head_dim]` of the same type. `layers` and `kv_heads`
    are the global ranges that the rank holds. With `layer` (a global number) only that layer is copied. The
    device blocks must not change meanwhile. Releases the GIL.

    A pool on a GPU is copied on the current stream, which the caller waits for. That takes a host buffer that is
    registered with the device; where that was refused, give as `copy` the `copy_slabs` of the
    `HostRegistration`.
    """
    return _copy(pool, host, pairs, layers, kv_heads, layer, copy, to_host=True)


def swap_in(
    pool: Tensor,
    host: Tensor,
    pairs: BlockPairs,
    *,
    layers: range,
    kv_heads: range,
    layer: int | None = None,
    copy: SlabCopy | None = None,
) -> int:
    """Copy blocks from the host buffer to the device pool. Arguments and result as for `swap_out`."""
    return _copy(pool, host, pairs, layers, kv_heads, layer, copy, to_host=False)


def block_table(pairs: BlockPairs, pool: Tensor, host: Tensor) -> Tensor:
    """`pairs` as a tensor beside the pool, their blocks checked: made once, it serves every layer of a Forward.

    The copy to a GPU waits for nothing; it runs on the current stream.
    """
    table = pairs if isinstance(pairs, Tensor) else torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    _check_blocks(table, pool, host)
    return _beside(table, pool)


def copy_slabs(near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
    """Copy the slabs of the pairs in `table` `[n, 2]`, n > 0, between two views of blocks.

    `near` is `[device blocks, layers, 2, local heads, block_size, head_dim]`, `far` the same of the host buffer.
    For a `near` on a GPU, block numbers in a CPU `table` are checked here, those on the GPU are not.
    """
    if near.is_cuda:
        if not table.is_cuda:
            _check_blocks(table, near, far)
        _device_kernel()(near, far, _beside(table, near), to_host)
        return
    kernel = _kernel()
    if kernel is None:
        _copy_by_indexing(near, far, table, to_host)
    else:
        _copy_by_kernel(kernel, near, far, table, to_host)


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
    layers: range,
    kv_heads: range,
    layer: int | None,
    copy: SlabCopy | None,
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
    (copy or copy_slabs)(near, far, table, to_host)
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
    table = table.cpu()
    _check_blocks(table, near, far)
    device_blocks, host_blocks = table.unbind(1)
    if to_host:
        far[host_blocks] = near[device_blocks].to(far.device)
    else:
        near[device_blocks] = far[host_blocks].to(near.device)


def _check_blocks(table: Tensor, near: Tensor, far: Tensor) -> None:
    if len(table):
        (low, other), (device, host) = table.amin(0).tolist(), table.amax(0).tolist()
        assert min(low, other) >= 0 and device < len(near) and host < len(far), (
            f"blocks {low} to {device} and {other} to {host} of pools of {len(near)} and {len(far)}"
        )


def _beside(table: Tensor, pool: Tensor) -> Tensor:
    if table.is_cuda or not pool.is_cuda:
        return table
    return table.pin_memory().to(pool.device, non_blocking=True)  # from pageable memory it could wait


@cache
def _device_kernel() -> SlabCopy:
    missing = missing_for_triton()
    if missing is not None:
        logger.warning(
            "KV is copied by torch's indexing, which is slow and makes the device wait: %s", missing
        )
        return _copy_by_indexing
    from seesaw.kv.triton_copies import copy_slabs

    return copy_slabs


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
