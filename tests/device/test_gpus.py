"""Which GPUs are visible, told by a stand-in for the driver's library."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from seesaw.core.errors import ConfigError
from seesaw.device import gpus
from seesaw.device.gpus import Gpu, choose_kind, default_ranks, require_cuda_build, visible_gpus

GIB = 1 << 30
UUIDS = ("GPU-aaaa1111-0", "GPU-aaaa2222-1", "GPU-bbbb3333-2")
MIG = "MIG-cccc4444"


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml(ModuleType):
    """Three GPUs, of which `divided` are in MIG mode, and one instance."""

    NVMLError = NvmlError
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = 12, 9

    def __init__(
        self, *, names: tuple[str, ...] = ("L4",) * 3, divided: tuple[int, ...] = (), fails: int = 0
    ) -> None:
        super().__init__("pynvml")
        self.names, self.divided, self.fails, self.open = names, divided, fails, 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise NvmlError(self.fails)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid != MIG:
            raise NvmlError(6)
        return 100

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return UUIDS[handle].encode()

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "MIG 1g" if handle == 100 else self.names[handle]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if handle == 0 and not self.divided:
            raise NvmlError(3)  # not supported
        return [int(handle in self.divided), 0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=24 * GIB, free=(20 - handle % 100) * GIB)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch, FakeNvml())


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def gpu(number: int) -> Gpu:
    return Gpu("L4", 24 * GIB, (20 - number) * GIB)


@pytest.mark.parametrize(
    ("setting", "numbers"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("GPU-bbbb,GPU-aaaa2222-1", [2, 1]),
        ("1,GPU-aaaa1111", [1, 0]),
        ("1,7,0", [1]),  # what follows an entry that names nothing is not visible
        ("2,-1,0", [2]),
        ("0,GPU-aaaa,1", [0]),  # could be two
    ],
)
def test_what_the_variable_shows(setting: str | None, numbers: list[int], nvml: FakeNvml) -> None:
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    assert visible_gpus(environment) == [gpu(number) for number in numbers]
    assert nvml.open == 0


@pytest.mark.parametrize("setting", ["", "-1", "none", "GPU-aaaa", "1,GPU-aaaa2222", "9"])
def test_none_is_visible(setting: str, nvml: FakeNvml) -> None:
    with pytest.raises(ConfigError, match=f"no GPU is visible with CUDA_VISIBLE_DEVICES='{setting}'"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": setting})


def test_instances_of_a_divided_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(divided=(1,)))
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": f"{MIG},0"}) == [Gpu("MIG 1g", 24 * GIB, 20 * GIB), gpu(0)]
    by_torch = [Gpu("what CUDA chose", 1, 1)]
    monkeypatch.setattr(gpus, "_by_torch", lambda environment: by_torch)
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "1"}):
        assert visible_gpus(environment) == by_torch


@pytest.mark.parametrize(
    ("number", "said"), [(12, "driver's library is not found"), (999, "does not answer")]
)
def test_no_driver(number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(fails=number))
    with pytest.raises(ConfigError, match=said):
        visible_gpus({})


def test_mixed_models_may_be_numbered_otherwise_by_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, FakeNvml(names=("L4", "A100", "L4")))
    visible_gpus({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        visible_gpus({})
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in caplog.text


def test_without_the_package_a_process_of_its_own_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def run(command: list[str], **options: Any) -> Any:
        assert command[0] == sys.executable and options["env"] == {"A": "b"}
        compile(command[2], "question", "exec")
        return SimpleNamespace(stdout='a word of torch\n[["L4", 24, 20], ["L4", 24, 19]]\n')

    monkeypatch.setattr(subprocess, "run", run)
    assert visible_gpus({"A": "b"}) == [Gpu("L4", 24, 20), Gpu("L4", 24, 19)]


def test_gpus_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(
        gpus, "_ASK_TORCH", "raise RuntimeError('CUDA error: the GPU has fallen off the bus')"
    )
    with pytest.raises(ConfigError, match="cannot be opened: RuntimeError: CUDA error: the GPU has fallen"):
        visible_gpus()


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA; install a CUDA build"):
        require_cuda_build()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    require_cuda_build()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEESAW_DEVICE", raising=False)
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_the_device_is_a_gpu_where_there_are_some(
    driver: None, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (choose_kind("auto"), choose_kind("cpu"), choose_kind("cuda")) == ("cuda", "cpu", "cuda")
    monkeypatch.setenv("SEESAW_DEVICE", "cpu")
    assert (choose_kind("auto"), choose_kind("cuda")) == ("cpu", "cuda")
    monkeypatch.setenv("SEESAW_DEVICE", "tpu")
    with pytest.raises(ConfigError, match="device 'tpu': 'cpu' and 'cuda' are supported"):
        choose_kind("auto")


def test_without_a_driver_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEESAW_DEVICE", raising=False)
    monkeypatch.setattr(gpus, "_DRIVERS", ("/nowhere",))
    monkeypatch.setattr(gpus, "visible_gpus", lambda: pytest.fail("asked"))
    assert choose_kind("auto") == "cpu"


def test_gpus_that_cannot_be_used_leave_the_cpu_and_a_warning(
    driver: None, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_kind("auto") == "cpu"
    assert "built without CUDA" in caplog.text and "on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("cores", "threads", "ranks"), [(1, 1, 1), (2, 1, 2), (2, 4, 1), (12, 1, 8), (12, 3, 4), (64, 4, 8)]
)
def test_ranks_of_a_host(cores: int, threads: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert default_ranks("cpu", threads=threads) == ranks


def test_ranks_of_gpus(nvml: FakeNvml) -> None:
    assert default_ranks("cuda") == 3
    assert default_ranks("cuda", ranks_per_gpu=2, threads=4) == 6
    assert default_ranks("cuda", gpus=[Gpu("L4", GIB, GIB)]) == 1
