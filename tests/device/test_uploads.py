"""Pinned memory on its way to the device and back."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from seesaw.core.errors import ConfigError
from seesaw.device import cuda
from seesaw.device.cpu import CpuDevice
from seesaw.device.cuda import CudaDevice
from seesaw.device.select import open_device
from tests.device.races import FakeCuda, FakeEvent


def device(api: FakeCuda) -> CudaDevice:
    """Without a GPU."""
    return CudaDevice("cpu", api=api, torch_device=torch.device("cpu"))


def test_arrays_arrive_with_their_types_and_shapes() -> None:
    """Of any number and size in one copy; none of them shares memory with what is uploaded next."""
    ours = device(FakeCuda())
    arrays = [
        np.arange(7, dtype=np.int64),
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.zeros(0, dtype=np.int32),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.arange(100_000, dtype=np.int64),
    ]
    first = ours.upload(arrays)
    ours.upload([array + 1 for array in arrays])
    for array, tensor, plain in zip(
        arrays, first, CpuDevice().upload([a.copy() for a in arrays]), strict=True
    ):
        assert tensor.dtype == plain.dtype and tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), array)
    ours.close()


def test_pinned_memory_is_filled_again_only_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the copy out of a piece, and for no other."""
    api, waited = FakeCuda(), list[FakeEvent]()
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: waited.append(self))
    recorded: list[FakeEvent] = []
    record = FakeEvent.record
    monkeypatch.setattr(
        FakeEvent, "record", lambda self, stream: (recorded.append(self), record(self, stream))[1]
    )
    made: list[torch.Tensor] = []
    pinned = cuda._pinned
    monkeypatch.setattr(cuda, "_pinned", lambda size, on: (made.append(pinned(size, on)), made[-1])[1])
    ours = device(api)
    for number in range(3 * cuda._PIECES):
        (tensor,) = ours.upload([np.full(10, number, dtype=np.int64)])
        assert tensor.tolist() == [number] * 10
    assert len(made) == cuda._PIECES
    assert waited == recorded[: 2 * cuda._PIECES]
    ours.close()


def test_a_download_is_whole_when_it_is_told_of() -> None:
    """It is a copy: what the device computes next does not change it."""
    ours, told = device(FakeCuda()), list[list[int]]()
    tensor = torch.arange(5)
    copy = ours.download(tensor)
    ours.compute.notify(lambda: told.append(copy.tolist()))
    tensor.zero_()
    ours.close()
    assert told == [[0, 1, 2, 3, 4]]


def test_what_fails_on_a_stream_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """To whoever launches next, waits, or closes; calls behind it are dropped."""
    before = set(threading.enumerate())
    ours, told = device(FakeCuda()), list[str]()

    def fail(event: FakeEvent) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(FakeEvent, "synchronize", fail)
    ours.to_host.notify(lambda: told.append("first"))
    ours.to_host.notify(lambda: told.append("second"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ours.close()
    since = set(threading.enumerate()) - before
    assert not [thread for thread in since if thread.name.startswith("seesaw-")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ours.to_host.launch(lambda: None)
    ours.close()
    assert told == []


@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    """One sentence."""
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        open_device(name)
