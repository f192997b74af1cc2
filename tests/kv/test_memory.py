"""The host buffer and the device pool as memory: sizes, sharing between processes, lifetimes."""

from __future__ import annotations

import os

import pytest
import torch

from seesaw.core.errors import ConfigError, MemoryBudgetError
from seesaw.kv.device_pool import DevicePool
from seesaw.kv.host_buffer import HostBuffer

SHAPE = (64, 3, 2, 16, 32)  # blocks, layers, KV heads, block size, head_dim
BYTES = 64 * 3 * 2 * 2 * 16 * 32 * 2


def create() -> HostBuffer:
    return HostBuffer.create(*SHAPE, torch.bfloat16)


def test_size_is_exact_and_sealed() -> None:
    host = create()
    assert host.bytes == BYTES == os.fstat(host.fd).st_size
    assert host.tensor.shape == (64, 3, 2, 2, 16, 32)
    for size in (BYTES - 4096, BYTES + 4096):
        with pytest.raises(OSError):
            os.ftruncate(host.fd, size)
    with pytest.raises(IndexError):
        host.tensor[64]


def test_pages_come_at_first_touch() -> None:
    host = create()
    assert os.fstat(host.fd).st_blocks == 0
    assert not host.tensor[5].any()
    host.tensor[7] = 1
    assert 0 < os.fstat(host.fd).st_blocks * 512 < BYTES


def test_processes_share_it() -> None:
    host = create()
    host.tensor[3] = 1.5
    child = os.fork()
    if child == 0:
        status = 1
        try:
            other = HostBuffer.attach(host.fd, *SHAPE, torch.bfloat16)
            other.tensor[4, 2, 1, 1, 15, 31] = other.tensor[3, 1, 0, 1, 2, 3] + 1
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert host.tensor[4, 2, 1, 1, 15, 31] == 2.5
    second = HostBuffer.attach(host.fd, *SHAPE, torch.bfloat16)
    second.tensor[9] = 3
    assert (host.tensor[9] == 3).all()


def test_attach_checks_the_size() -> None:
    host = create()
    with pytest.raises(ConfigError, match="host buffer"):
        HostBuffer.attach(host.fd, 65, *SHAPE[1:], torch.bfloat16)


def test_views_outlive_close() -> None:
    host = create()
    view, fd = host.tensor[2], host.fd
    view.fill_(4)
    host.close()
    host.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(AssertionError):
        host.tensor.zero_()
    assert (view == 4).all()


def test_attached_buffer_outlives_the_first() -> None:
    host = create()
    other = HostBuffer.attach(host.fd, *SHAPE, torch.bfloat16)
    host.tensor[0] = 6
    host.close()
    assert (other.tensor[0] == 6).all()


def test_no_blocks() -> None:
    host = HostBuffer.create(0, *SHAPE[1:], torch.float32)
    assert host.bytes == 0 and host.tensor.shape == (0, 3, 2, 2, 16, 32)
    assert HostBuffer.attach(host.fd, 0, *SHAPE[1:], torch.float32).tensor.numel() == 0


def test_more_than_the_system_can_give() -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryBudgetError, match="host buffer"):
        HostBuffer.create(1 << 44, *SHAPE[1:], torch.float32)
    assert len(os.listdir("/proc/self/fd")) == open_before
    with pytest.raises(MemoryBudgetError, match="device pool"):
        DevicePool(1 << 60)


def test_pool_is_viewed_anew_over_the_same_bytes() -> None:
    pool = DevicePool(8192)
    first = pool.view(4, 2, 2, 4, 8, torch.float32)
    assert first.numel() * 4 == 4096 and pool.blocks is first
    first.fill_(1)
    second = pool.view(8, 4, 1, 4, 8, torch.float32)
    assert second.data_ptr() == first.data_ptr()
    assert int(second.sum()) == 1024
    layer = pool.layer(3)
    assert layer.shape == (8, 2, 1, 4, 8) and layer.stride(0) == second.stride(0)
    layer.fill_(9)
    assert (second[:, 3] == 9).all() and (second[:, :3] != 9).all()
    assert layer[0].is_contiguous()


def test_pool_view_must_fit() -> None:
    pool = DevicePool(4096)
    pool.view(4, 2, 2, 4, 8, torch.float32)
    with pytest.raises(AssertionError, match="4608"):
        pool.view(9, 1, 2, 4, 8, torch.float32)
    assert DevicePool(0).view(0, 2, 2, 4, 8, torch.float32).numel() == 0
