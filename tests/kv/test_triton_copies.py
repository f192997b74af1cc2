"""One-hop copies of slabs by the Triton kernel, byte for byte, interpreted; and that it compiles for GPUs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from tests import triton_interpreter

triton_interpreter.skip_unless_interpreting()

from seesaw.core.layout import Layout  # noqa: E402 - behind the interpreter's switch
from seesaw.kv import transfers  # noqa: E402
from seesaw.kv.transfers import SlabCopy, block_table, swap_in, swap_out  # noqa: E402
from seesaw.kv.triton_copies import copy_slabs  # noqa: E402
from seesaw.weights.sharding import make_sharding, rank_view  # noqa: E402
from tests.kv.test_transfers import BLOCK_SIZE, HEAD_DIM, bits, host_buffer, pool_of, random_kv, spec  # noqa: E402

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
PAIRS = torch.tensor([[3, 0], [0, 4], [2, 1]])


def random_bits(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Any bits, NaN of any payload among them; `offset` elements into the memory."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.empty(size + 64, dtype=torch.uint8).random_(256)
    return raw[offset * dtype.itemsize :][:size].view(dtype).view(shape)


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def check(near: Tensor, far: Tensor, part: tuple[slice, slice], copy: SlabCopy) -> None:
    """Both ways for layers and heads `part` of whole tensors; what is not copied stays as it is."""
    layers, heads = part
    for to_host in (True, False):
        source, target = (near, far) if to_host else (far, near)
        wanted, before = target.clone(), source.clone()
        for device, host in PAIRS.tolist():
            if to_host:
                wanted[host, layers, :, heads] = near[device, : layers.stop - layers.start]
            else:
                wanted[device, : layers.stop - layers.start] = far[host, layers, :, heads]
        count = layers.stop - layers.start
        copy(near[:, :count], far[:, layers, :, heads], PAIRS, to_host)
        assert torch.equal(raw(target), raw(wanted)) and torch.equal(raw(source), raw(before))
        raw_near = near.view(-1).view(torch.uint8)
        raw_near.copy_(raw_near.flip(0))  # other bits for the way back


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 32), (4, 5), (3, 7), (1, 1)])
def test_slabs_of_any_size_and_type(
    dtype: torch.dtype, programs: int, block_size: int, head_dim: int
) -> None:
    """Of ranks with all heads or some, all layers or one: sizes that 16 divides and that nothing divides."""
    torch.manual_seed(block_size)
    copy = partial(copy_slabs, programs=programs)
    for local, heads in ((4, slice(0, 4)), (1, slice(3, 4)), (3, slice(1, 4))):
        for layers in (slice(0, 2), slice(1, 2)):
            near = random_bits(4, 2, 2, local, block_size, head_dim, dtype=dtype)
            far = random_bits(5, 2, 2, 4, block_size, head_dim, dtype=dtype)
            check(near, far, (layers, heads), copy)


@pytest.mark.parametrize("local", [2, 4])
def test_slabs_of_several_tiles(local: int) -> None:
    """Of a part of the heads, the last tile not full; of all of them, a block in one piece."""
    near = random_bits(4, 2, 2, local, 64, 72, dtype=torch.bfloat16)
    far = random_bits(5, 2, 2, 4, 64, 72, dtype=torch.bfloat16)
    check(near, far, (slice(0, 2), slice(0, local)), copy_slabs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("here", "there"), [(0, 1), (1, 0), (2, 2), (3, 5), (4, 8)])
def test_memory_at_any_address(dtype: torch.dtype, here: int, there: int) -> None:
    near = random_bits(4, 2, 2, 2, 4, 8, dtype=dtype, offset=here)
    far = random_bits(5, 3, 2, 4, 4, 8, dtype=dtype, offset=there)
    check(near, far, (slice(1, 3), slice(2, 4)), copy_slabs)


def test_written_under_one_sharding_and_read_under_another() -> None:
    """Through `swap_out` and `swap_in`, as ranks do it, with the host buffer of shared memory."""
    model, chance = spec(4), random.Random(5)
    kv, host = random_kv(4, 5), host_buffer(4)
    out_pairs, in_pairs = [(0, 4), (3, 0), (4, 5)], [(2, 5), (4, 4), (1, 0)]
    for rank in range(4):
        view = rank_view(model, make_sharding(model, Layout(pp=2, tp=2)), rank)
        pool, layers, heads = pool_of(view), view.layers, view.kv_heads
        pool.copy_(kv[:, layers.start : layers.stop, :, heads.start : heads.stop])
        table = block_table(out_pairs, pool, host)
        for layer in layers if chance.random() < 0.5 else (None,):
            swap_out(pool, host, table, layers=layers, kv_heads=heads, layer=layer, copy=copy_slabs)
    for device, block in out_pairs:
        assert torch.equal(bits(host[block]), bits(kv[device]))
    for rank in range(4):
        view = rank_view(model, make_sharding(model, Layout(tp=4)), rank)
        pool, layers, heads = pool_of(view), view.layers, view.kv_heads
        bits(pool).fill_(77)
        swap_in(pool, host, in_pairs, layers=layers, kv_heads=heads, copy=copy_slabs)
        expected = torch.full_like(bits(pool), 77)
        for device, block in in_pairs:
            expected[device] = bits(host[block, layers.start : layers.stop, :, heads.start : heads.stop])
        assert torch.equal(bits(pool), expected)


def test_nothing_to_copy() -> None:
    near, far = random_kv(2, 5), host_buffer(2)
    copy_slabs(near, far, torch.empty(0, 2, dtype=torch.int64), True)
    assert not bits(far).any()


def test_views_that_are_no_slabs_are_refused() -> None:
    near, far = random_kv(2, 5), random_kv(2)
    table = torch.tensor([[0, 0]])
    for wrong_near, wrong_far, wrong_table in (
        (near[..., ::2], far[..., ::2], table),
        (near[:, ::2], far[:, ::2], table),
        (near[:, 1:], far, table),
        (near, far, table.int()),
        (near.float(), far, table),
        (near, far, table.expand(2, 2).t()),
    ):
        with pytest.raises(AssertionError):
            copy_slabs(wrong_near, wrong_far, wrong_table, True)


@pytest.mark.parametrize("pair", [(5, 0), (0, 6), (-1, 0), (0, -1)])
def test_tables_are_checked_where_they_are_made(pair: tuple[int, int]) -> None:
    kv, host = random_kv(2, 5), host_buffer(2)
    assert block_table([], kv, host).shape == (0, 2)
    assert block_table([(1, 2)], kv, host).tolist() == [[1, 2]]
    with pytest.raises(AssertionError, match="of pools of 5 and 6"):
        block_table([(0, 0), pair], kv, host)


def test_without_triton_a_gpu_copies_by_indexing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transfers, "missing_for_triton", lambda: "Triton is not installed")
    transfers._device_kernel.cache_clear()
    try:
        copy = transfers._device_kernel()
    finally:
        transfers._device_kernel.cache_clear()
    assert "Triton is not installed" in caplog.text
    near, far = (random_bits(b, 2, 2, 2, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16) for b in (4, 5))
    check(near, far, (slice(0, 2), slice(0, 2)), copy)
    monkeypatch.undo()
    assert transfers._device_kernel() is copy_slabs


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_and_moves_16_bytes_at_a_time(capability: int) -> None:
    """To machine code, without a GPU, in a process of its own, since this one interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kv.compile_copies", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
