"""Registration of host memory with the device, against a driver that records and refuses."""

from __future__ import annotations

import logging
import mmap
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.device import registration
from seesaw.device.registration import CudaRuntime, Registration
from tests.device.driver import Device, refusing

PAGE = mmap.PAGESIZE


def mapped(pages: int, extra: int = 0) -> Tensor:
    """Bytes at the beginning of a page."""
    return torch.frombuffer(mmap.mmap(-1, pages * PAGE + extra), dtype=torch.uint8)


def register(device: Device, *mappings: Tensor, **options: Any) -> Registration:
    return Registration(mappings, "weights", remedy="use fewer of them", runtime=device, **options)


def test_memory_is_registered_whole_and_in_pages() -> None:
    device, host = Device(), mapped(3, extra=5)
    pages = register(device, host)
    (call,) = device.calls
    assert call == ("register", host.data_ptr(), 4 * PAGE) and call[1] % PAGE == 0
    assert pages.registered and pages.spans == (call[1:],)
    inner = host[PAGE // 2 + 7 : 2 * PAGE - 9]  # within a mapping, across two pages
    register(device, inner[PAGE // 2 :], read_only=True)
    assert device.calls[-1] == ("read-only", host.data_ptr() + PAGE, PAGE)
    register(device, inner, read_only=True)
    assert device.calls[-1] == ("read-only", host.data_ptr(), 2 * PAGE)


def test_the_device_is_waited_for_before_pages_go_back() -> None:
    device, host = Device(), mapped(4)
    pages = register(device, host)
    pages.close()
    pages.close()
    assert [name for name, *_ in device.calls] == ["register", "synchronize", "unregister"]
    assert not device.registered and not pages.registered and not pages.reaches(host) and pages.spans == ()


def test_a_driver_that_refuses_much_at_once_gets_slices(caplog: pytest.LogCaptureFixture) -> None:
    host = mapped(10)
    device = Device(refuse=lambda size: 2 if size > 4 * PAGE else 0)
    pages = register(device, host, slice_bytes=4 * PAGE)
    assert pages.registered and not caplog.records
    assert [size for _, size in pages.spans] == [4 * PAGE, 4 * PAGE, 2 * PAGE]
    ends = [address + size for address, size in pages.spans]
    assert ends[:-1] == [address for address, _ in pages.spans[1:]]
    assert pages.reaches(host[3 * PAGE : 5 * PAGE]) and not pages.in_one_span(host[3 * PAGE : 5 * PAGE])
    assert pages.in_one_span(host[4 * PAGE : 8 * PAGE])
    pages.close()
    assert not device.registered


@pytest.mark.parametrize("limit", [64 << 10, resource.RLIM_INFINITY])
def test_a_refusal_leaves_nothing_behind_and_says_what_helps(
    limit: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    left = [2]

    def refuse(size: int) -> int:
        left[0] -= size <= 4 * PAGE
        return 2 if size > 4 * PAGE or left[0] < 0 else 0

    device = Device(refuse)
    pages = register(device, mapped(16), slice_bytes=4 * PAGE)
    assert not pages.registered and not device.registered
    assert [name for name, *_ in device.calls] == ["register"] * 4 + ["unregister"] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("weights: 64.0 KiB cannot be registered with CUDA (out of memory, error 2)")
    assert text.endswith("use fewer of them")
    assert ("ulimit -l unlimited" in text and "64.0 KiB now" in text) == (limit == 64 << 10)
    pages.close()


def test_of_several_mappings_those_before_a_refusal_stay(caplog: pytest.LogCaptureFixture) -> None:
    """One warning for all; what lies behind is not even asked for."""
    device = Device(refuse=lambda size: 2 if size == 3 * PAGE else 0)
    mappings = [mapped(2), mapped(3), mapped(1)]
    pages = register(device, *mappings, read_only=True)
    assert [pages.reaches(mapping) for mapping in mappings] == [True, False, False]
    assert [call[1:] for call in device.calls] == [(m.data_ptr(), m.nbytes) for m in mappings[:2]]
    (record,) = caplog.records
    assert "weights: 16.0 KiB of 24.0 KiB cannot be registered" in record.getMessage()
    assert not pages.registered
    pages.close()
    assert not device.registered


def test_what_cannot_be_given_back_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    pages = register(device, mapped(1))
    device.registered.clear()
    pages.close()
    assert "weights: " in caplog.text and "not registered (CUDA error 713)" in caplog.text


def test_memory_of_no_bytes() -> None:
    device = Device(refusing)
    pages = register(device, torch.empty(0, 3, 2))
    assert pages.registered
    pages.close()
    assert device.calls == []


def test_cuda_is_called_with_its_flags_and_errors_do_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    library = SimpleNamespace(
        cudaHostRegister=lambda *given: calls.append(given) or (2 if given[1] > 100 else 0),
        cudaHostUnregister=lambda address: 713,
        cudaError=lambda code: code,
        cudaGetErrorString=lambda code: f"error number {code}",
    )
    monkeypatch.setattr(registration.torch.cuda, "cudart", lambda: library)
    cleared: list[str] = []

    def kernel(size: int, device: str) -> None:
        cleared.append(device)
        raise RuntimeError("CUDA error: out of memory")  # as torch reports what an earlier call left

    monkeypatch.setattr(registration.torch, "ones", kernel)
    runtime = CudaRuntime()
    assert runtime.register(4096, 100, False) == 0 and cleared == []
    assert runtime.register(4096, 200, True) == 2 and cleared == ["cuda"]
    assert calls == [(4096, 100, 3), (4096, 200, 11)]
    assert runtime.unregister(4096) == 713 and runtime.explain(713) == "error number 713"
