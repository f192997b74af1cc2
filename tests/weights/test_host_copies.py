"""Boxes of parameters on their way to a device: by which path, with how many bytes, and whether early or late."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seesaw.core.errors import MemoryBudgetError
from seesaw.models.parameters import parameters
from seesaw.weights import host_copies
from seesaw.weights.host_copies import HostCopies
from seesaw.weights.intervals import Interval, Region
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import copy_list, make_sharding
from seesaw.weights.store import HostWeightStore
from tests.device.driver import Device, refusing
from tests.weights.shapes import TINY, usable

PAGE = mmap.PAGESIZE
ROWS, COLUMNS = 64, 96


class Kernel:
    """Stands in for the Triton kernel: does what it is given when the device comes to it, and counts bytes."""

    def __init__(self, device: Device) -> None:
        self.device, self.bytes, self.calls = device, 0, 0

    def __call__(self, source: Tensor, target: Tensor) -> None:
        self.calls += 1
        self.bytes += source.numel() * source.element_size()
        self.device.launch(lambda: target.copy_(source))


def parameter(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A mapping, and a matrix in it."""
    mapping = torch.frombuffer(mmap.mmap(-1, 8 * PAGE), dtype=torch.uint8)
    matrix = mapping[128 : 128 + ROWS * COLUMNS * dtype.itemsize].view(dtype).view(ROWS, COLUMNS)
    matrix.copy_(torch.randn(ROWS, COLUMNS))
    return mapping, matrix


def part(rows: tuple[int, int], columns: tuple[int, int]) -> Region:
    return (Interval(*rows), Interval(*columns))


WHOLE_ROWS, OF_ROWS = part((8, 40), (0, COLUMNS)), part((0, ROWS), (24, 48))


def test_whole_rows_are_copied_by_the_driver_and_parts_of_rows_by_the_kernel() -> None:
    """And what is converted by the kernel too. Exactly the bytes of the box cross the link."""
    mapping, matrix = parameter()
    device = Device()
    kernel = Kernel(device)
    copies = HostCopies([mapping], runtime=device, copy_rows=kernel)
    assert copies.registered and device.calls == [("read-only", mapping.data_ptr(), 8 * PAGE)]
    target = torch.zeros(32, COLUMNS, dtype=torch.bfloat16)
    copies.copy_box(matrix, WHOLE_ROWS, target, part((0, 32), (0, COLUMNS)))
    assert kernel.calls == 0 and torch.equal(target, matrix[8:40])
    quarter = torch.zeros(ROWS, 24, dtype=torch.bfloat16)
    copies.copy_box(matrix, OF_ROWS, quarter, part((0, ROWS), (0, 24)))
    assert (kernel.calls, kernel.bytes) == (1, quarter.nbytes)
    assert not quarter.any()  # nobody waited
    wide = torch.zeros(32, COLUMNS)
    copies.copy_box(matrix, WHOLE_ROWS, wide, part((0, 32), (0, COLUMNS)))
    assert (kernel.calls, kernel.bytes) == (2, quarter.nbytes + target.nbytes)
    device.synchronize()
    assert torch.equal(quarter, matrix[:, 24:48]) and torch.equal(wide, matrix[8:40].float())
    assert device.pinned_bytes == 0
    copies.close()
    assert not device.registered


def test_a_copy_by_the_driver_stays_within_a_slice() -> None:
    mapping, matrix = parameter()
    device = Device(refuse=lambda size: 2 if size > PAGE else 0)
    kernel = Kernel(device)
    copies = HostCopies([mapping], runtime=device, copy_rows=kernel, slice_bytes=PAGE)
    target = torch.zeros(40, COLUMNS, dtype=torch.bfloat16)
    copies.copy_box(matrix, part((0, 40), (0, COLUMNS)), target, part((0, 40), (0, COLUMNS)))
    assert kernel.calls == 1  # it crosses from one to the next
    copies.copy_box(matrix, part((0, 8), (0, COLUMNS)), target, part((0, 8), (0, COLUMNS)))
    assert kernel.calls == 1
    device.synchronize()
    assert torch.equal(target, matrix[:40])


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_refused_goes_through_two_halves(
    seed: int, with_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the device does its part: a wait that is missing would copy what comes after."""
    mapping, matrix = parameter(torch.float32 if seed % 2 else torch.bfloat16)
    chance = random.Random(seed)
    device = Device(refusing, chance)
    monkeypatch.setattr(host_copies, "_kernel", lambda: None)
    staging = (64, 1000, 5000, 1 << 20)[seed]  # less than a row in a half, a few, all of them
    copies = HostCopies(
        [mapping], runtime=device, staging_bytes=staging, copy_rows=Kernel(device) if with_kernel else None
    )
    if not with_kernel:  # the driver's copies are late as well
        late(device, monkeypatch)
    expected, target = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bfloat16)
    for _ in range(12):
        top, left = chance.randrange(ROWS), chance.randrange(COLUMNS)
        region = part((top, chance.randint(top, ROWS)), (left, chance.randint(left, COLUMNS)))
        inside = tuple(slice(*interval) for interval in region)
        expected[inside] = matrix[inside].to(torch.bfloat16)
        copies.copy_box(matrix, region, target, region)
        if chance.random() < 0.5:
            device.synchronize()
            assert torch.equal(target, expected)
    copies.close()
    device.synchronize()
    assert torch.equal(target, expected) and device.pinned_bytes <= staging


def late(device: Device, patch: pytest.MonkeyPatch) -> None:
    """Copies with `non_blocking` into a target of ours are done when the device comes to them."""
    plain = Tensor.copy_

    def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            return plain(self, source)
        device.launch(lambda: plain(self, source))
        return self

    patch.setattr(Tensor, "copy_", copy)


def test_a_parameter_that_is_not_aligned_is_converted_by_way_of_the_halves() -> None:
    mapping, _ = parameter()
    raw = mapping.numpy()
    matrix = torch.frombuffer(raw, dtype=torch.bfloat16, count=600, offset=33).view(20, 30)
    matrix.copy_(torch.randn(20, 30))
    device = Device()
    kernel = Kernel(device)
    copies = HostCopies([mapping], runtime=device, copy_rows=kernel)
    target, box = torch.zeros(20, 10), part((0, 20), (5, 15))
    copies.copy_box(matrix, box, target, part((0, 20), (0, 10)))
    device.synchronize()
    assert torch.equal(target, matrix[:, 5:15].float()) and device.pinned_bytes > 0
    same = torch.zeros(20, 10, dtype=torch.bfloat16)
    before = device.pinned_bytes
    copies.copy_box(matrix, box, same, part((0, 20), (0, 10)))  # bits as they are may lie anywhere
    device.synchronize()
    assert torch.equal(same, matrix[:, 5:15]) and device.pinned_bytes == before


def test_no_memory_to_copy_through_is_said() -> None:
    mapping, matrix = parameter()
    device = Device(refusing)
    device.pinned = lambda size: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory"))  # type: ignore[method-assign]
    copies = HostCopies([mapping], runtime=device, copy_rows=Kernel(device))
    box = part((0, 4), (0, 4))
    with pytest.raises(MemoryBudgetError, match="weights: neither can it be registered"):
        copies.copy_box(matrix, box, torch.zeros(4, 4, dtype=torch.bfloat16), box)


@pytest.mark.parametrize("refuse", [lambda size: 0, refusing])
def test_a_checkpoint_of_several_files(
    refuse: Callable[[int], int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file that holds a parameter is registered once, before the first copy; ranks get what CPU ranks get."""
    generator = torch.Generator().manual_seed(2)
    made = {p.name: torch.randn(p.shape, generator=generator) for p in parameters(TINY)}
    names = sorted(made)
    index = {}
    for number in range(3):
        file = f"model-0000{number}-of-00003.safetensors"
        save_file({name: made[name] for name in names[number::3]}, tmp_path / file)
        index |= dict.fromkeys(names[number::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {' + ", ".join(f'"{name}": "{file}"' for name, file in index.items()) + "}}"
    )
    device = Device(refuse)
    with HostWeightStore.open(tmp_path, TINY) as store:
        copies = HostCopies(store.mappings, runtime=device, copy_rows=Kernel(device))
        assert [call[0] for call in device.calls] == ["read-only"] * (1 if device.refuse(1) else 3)
        assert len(caplog.records) == (1 if device.refuse(1) else 0)
        for rank in range(4):
            old, new = (make_sharding(TINY, layout) for layout in usable(TINY, 4)[:2])
            ours, plain = (RankWeights(TINY, store, "bfloat16", rank) for _ in range(2))
            ours._fetch = copies.copy_box
            for weights in (ours, plain):
                weights.load(old)
                device.synchronize()  # in place of the stream on which all of it runs
                weights.transition(new, "delta")
            device.synchronize()
            assert copy_list(TINY, old, new, rank).bytes_fetched("bfloat16")
            assert all(torch.equal(plain.tensors[name], tensor) for name, tensor in ours.tensors.items())
        copies.close()


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host_copies, "missing_for_triton", lambda: "Triton is not installed")
    mapping, matrix = parameter()
    device = Device()
    copies = HostCopies([mapping], runtime=device)
    assert "Triton is not installed" in caplog.text
    target = torch.zeros(ROWS, 24, dtype=torch.bfloat16)
    copies.copy_box(matrix, OF_ROWS, target, part((0, ROWS), (0, 24)))
    assert torch.equal(target, matrix[:, 24:48]) and device.pinned_bytes > 0
