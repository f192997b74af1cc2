"""The host buffer registered with the device or not, against a driver that records, refuses and is late."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from seesaw.core.errors import MemoryBudgetError
from seesaw.kv.registered import HostRegistration
from seesaw.kv.transfers import copy_slabs, swap_in, swap_out
from tests.device.driver import Device, refusing
from tests.kv.test_transfers import BLOCK_SIZE, HEAD_DIM, LAYERS, bits, random_kv


def swap(device: Device, registration: HostRegistration, rounds: int, seed: int) -> None:
    """Random swaps both ways of a rank with some layers and heads, checked after each.

    Blocks that go out are others than those that come in: the order of the two streams is for the caller to keep.
    """
    chance = random.Random(seed)
    torch.manual_seed(seed)
    pool, host = random_kv(2, 30)[:, 2:5].contiguous(), registration_memory(registration)
    expected_pool, expected_host = bits(pool).clone(), bits(host).clone()
    where = {"layers": range(2, 5), "kv_heads": range(1, 3)}
    for _ in range(rounds):
        out, count = chance.random() < 0.5, chance.randint(1, 15)
        blocks = chance.sample(range(15, 30) if out else range(15), count)
        pairs = list(zip(blocks, chance.sample(range(40), count), strict=True))
        layer = chance.choice([None, 3])
        inner = slice(2, 5) if layer is None else slice(3, 4)
        of_pool = slice(inner.start - 2, inner.stop - 2)
        if out:
            swap_out(pool, host, pairs, **where, layer=layer, copy=registration.copy_slabs)
            for near, far in pairs:
                expected_host[far, inner, :, 1:3] = expected_pool[near, of_pool]
            assert torch.equal(bits(host), expected_host)  # done on return
        else:
            swap_in(pool, host, pairs, **where, layer=layer, copy=registration.copy_slabs)
            for near, far in pairs:
                expected_pool[near, of_pool] = expected_host[far, inner, :, 1:3]
            if chance.random() < 0.5:
                device.synchronize()
                assert torch.equal(bits(pool), expected_pool)
    device.synchronize()
    assert torch.equal(bits(pool), expected_pool)


def registration_memory(registration: HostRegistration) -> Tensor:
    return registration._memory


def big_host() -> Tensor:
    return random_kv(4, 40)


def test_a_registered_buffer_is_copied_in_one_hop() -> None:
    device, host = Device(chance=random.Random(1)), big_host()
    given: list[int] = []

    def one_hop(near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
        given.append(far.data_ptr())
        copy_slabs(near, far, table, to_host)

    with HostRegistration(host, runtime=device, device_copy=one_hop) as registration:
        swap(device, registration, rounds=5, seed=0)
        assert device.pinned_bytes == 0 and len(given) == 5
        assert all(host.data_ptr() <= address < host.data_ptr() + host.nbytes for address in given)
    assert not device.registered


def test_a_closed_registration_copies_nothing() -> None:
    device, host = Device(), big_host()
    registration = HostRegistration(host, runtime=device)
    registration.close()
    registration.close()
    assert not device.registered and not registration.registered
    with pytest.raises(AssertionError, match="closed"):
        registration.copy_slabs(host, host, torch.tensor([[0, 0]]), True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eager", [False, True])
def test_refused_memory_is_copied_through_two_halves(seed: int, eager: bool) -> None:
    """Whenever the device does its part: a wait that is missing would copy what is not there yet."""
    device = Device(refusing, random.Random(seed) if eager else None)
    block = 3 * 2 * 2 * BLOCK_SIZE * HEAD_DIM * 2
    staging = (2 * block, 6 * block, 64 * block)[seed % 3]  # one block in a half, a few, all of them
    registration = HostRegistration(
        big_host(), runtime=device, staging_bytes=staging, device_copy=device.copy
    )
    swap(device, registration, rounds=25, seed=seed)
    assert device.pinned_bytes == staging
    registration.close()


def test_halves_hold_a_block_at_least_and_wait_before_they_grow() -> None:
    device, host = Device(refusing), big_host()
    pool, heads = random_kv(4, 3), range(4)
    layer_bytes = 2 * 4 * BLOCK_SIZE * HEAD_DIM * 2
    registration = HostRegistration(
        host, runtime=device, staging_bytes=2 * layer_bytes, device_copy=device.copy
    )
    swap_in(pool, host, [(0, 7)], layers=range(LAYERS), kv_heads=heads, layer=2, copy=registration.copy_slabs)
    assert device.pinned_bytes == 2 * layer_bytes and not torch.equal(bits(pool[0, 2]), bits(host[7, 2]))
    swap_in(pool, host, [(1, 8)], layers=range(LAYERS), kv_heads=heads, copy=registration.copy_slabs)
    assert device.pinned_bytes == 2 * layer_bytes * (1 + LAYERS)
    assert torch.equal(bits(pool[0, 2]), bits(host[7, 2]))  # done before its half went away
    device.synchronize()
    assert torch.equal(bits(pool[1]), bits(host[8]))


def test_no_memory_to_copy_through_is_said(caplog: pytest.LogCaptureFixture) -> None:
    device, host = Device(refusing), big_host()
    device.pinned = lambda size: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory\nmore"))  # type: ignore[method-assign]
    registration = HostRegistration(host, runtime=device)
    with pytest.raises(
        MemoryBudgetError, match=r"neither .* nor .*pinned memory .*: CUDA error: out of memory$"
    ):
        registration.copy_slabs(host, host, torch.tensor([[0, 0]]), True)
