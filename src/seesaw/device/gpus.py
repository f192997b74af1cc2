"""Which GPUs are visible, asked without touching them.

The control process forks, and holds no memory of any GPU: so it makes no CUDA context. The driver's management
library (NVML, by the package `nvidia-ml-py`) answers without one; where the package is missing, torch is asked in a
process of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from seesaw.core.devices import CPU, CUDA, device_kind
from seesaw.core.errors import ConfigError

logger = logging.getLogger(__name__)

_PATIENCE = 120.0
"""Seconds for a process that loads torch and opens every GPU."""
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")
"""Files of which a machine with NVIDIA GPUs has one: Linux, Windows' subsystem, boards with a GPU of their own."""
_MOST_ON_HOST = 8
"""Ranks by default: more cores than that are for tokenising, copying and other jobs."""
_VISIBLE, _ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_ASK_TORCH = """
import json, torch
found = []
for number in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(number)
    found.append([torch.cuda.get_device_name(number), total, free])
print(json.dumps(found))
"""
_NO_DRIVER = (
    "device 'cuda': the NVIDIA driver's library is not found here; install the driver, or start the container with "
    "its GPUs (docker run --gpus all), or use --device cpu"
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A visible GPU, or an instance of one (MIG)."""

    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes that no process has taken."""


def require_cuda_build() -> None:
    """Raise `ConfigError` if the installed torch cannot drive GPUs. Imports torch, makes no context."""
    import torch

    if torch.version.cuda is None:
        raise ConfigError(
            f"device 'cuda': torch {torch.__version__} is built without CUDA; install a CUDA build of it "
            "(https://pytorch.org/get-started/locally), or use --device cpu"
        )


def has_driver() -> bool:
    """Whether this machine has a driver for NVIDIA GPUs, as far as a look at its device files tells."""
    return any(Path(driver).exists() for driver in _DRIVERS)


def choose_kind(device: str) -> str:
    """The kind that `device` names; of `auto`, what `$SEESAW_DEVICE` names, else `cuda` where there are GPUs that can
    be used, else `cpu`.

    Raises `ConfigError` for a kind that does not exist.
    """
    if device == "auto":
        device = os.environ.get("SEESAW_DEVICE") or device
    if device != "auto":
        return device_kind(device).name
    gpus, trouble = usable_gpus()
    if not trouble:
        return CUDA.name
    if gpus:
        logger.warning("ranks compute on the CPU, since of %s", trouble)
    return CPU.name


def usable_gpus() -> tuple[Sequence[Gpu], str]:
    """The GPUs that are seen, and in a few words why ranks cannot compute on them; empty if they can."""
    if not has_driver():
        return (), "there is no NVIDIA driver here"
    gpus: Sequence[Gpu] = ()
    try:
        gpus = visible_gpus()
        require_cuda_build()
    except ConfigError as error:
        return gpus, str(error)
    return gpus, ""


def default_ranks(
    device: str, *, threads: int = 1, ranks_per_gpu: int = 1, gpus: Sequence[Gpu] | None = None
) -> int:
    """How many ranks a node has where nobody says: `ranks_per_gpu` on each GPU; on the host one for every `threads`
    of its cores, at most eight.

    `gpus` are the visible ones, if they are known already. Raises `ConfigError` if GPUs are meant and there are none.
    """
    if device_kind(device).numbered:
        return len(visible_gpus() if gpus is None else gpus) * ranks_per_gpu
    return max(1, min(_MOST_ON_HOST, len(os.sched_getaffinity(0)) // threads))


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA would show to a process with this environment, in its order; at least one.

    Where CUDA orders GPUs of different models by speed and NVML by slot, a warning says so. Raises `ConfigError`
    if there is none, or no driver.
    """
    try:
        nvml: ModuleType | None = importlib.import_module("pynvml")
    except ImportError:
        logger.info("GPUs: torch is asked in a process of its own, since the package nvidia-ml-py is missing")
        nvml = None
    gpus = _by_torch(environment) if nvml is None else _by_nvml(nvml, environment)
    if not gpus:
        setting = environment.get(_VISIBLE)
        why = "" if setting is None else f" with {_VISIBLE}={setting!r}"
        raise ConfigError(f"device 'cuda': no GPU is visible{why}; make one visible, or use --device cpu")
    return gpus


def _by_nvml(nvml: Any, environment: Mapping[str, str]) -> list[Gpu]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            raise ConfigError(_NO_DRIVER) from None
        raise ConfigError(
            f"device 'cuda': the NVIDIA driver does not answer ({error}); nvidia-smi may say more"
        ) from None
    try:
        handles = _handles(nvml, environment.get(_VISIBLE))
        gpus = None if handles is None else [_gpu(nvml, handle) for handle in handles]
    except nvml.NVMLError as error:
        raise ConfigError(f"device 'cuda': the NVIDIA driver cannot describe its GPUs ({error})") from None
    finally:
        nvml.nvmlShutdown()
    if gpus is None:  # CUDA's own choice among the instances of partitioned GPUs
        return _by_torch(environment)
    if len({gpu.name for gpu in gpus}) > 1 and environment.get(_ORDER) != "PCI_BUS_ID":
        logger.warning(
            "GPUs of different models are visible; with %s=PCI_BUS_ID their numbers are sure", _ORDER
        )
    return gpus


def _handles(nvml: Any, visible: str | None) -> list[Any] | None:
    """NVML's handles of the visible GPUs; None where only CUDA can tell.

    As CUDA reads the variable: numbers, or UUIDs that may be cut short; what follows an entry that names nothing is
    not visible, and nothing is if one is named twice.
    """
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return None if any(_divided(nvml, handle) for handle in every) else every
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    chosen: list[Any] = []
    seen: set[str] = set()
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith("MIG-"):
            identity, handle = entry, _instance(nvml, entry)
            if handle is None:
                break
        else:
            number = _number(entry, uuids)
            if number is None:
                break
            if _divided(nvml, every[number]):
                return None
            identity, handle = uuids[number], every[number]
        if identity in seen:
            return []
        seen.add(identity)
        chosen.append(handle)
    return chosen


def _number(entry: str, uuids: Sequence[str]) -> int | None:
    """Which GPU an entry names; None for none, and where it could be several."""
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    if not entry.startswith("GPU-"):
        return None
    matching = [number for number, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _instance(nvml: Any, uuid: str) -> Any | None:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None


def _divided(nvml: Any, handle: Any) -> bool:
    """Whether a GPU is divided into instances (MIG)."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # most models know no such mode
        return False


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(_text(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))


def _text(value: str | bytes) -> str:
    """Older releases of the package answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _by_torch(environment: Mapping[str, str]) -> list[Gpu]:
    """Contexts end with the process that makes them."""
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        return [Gpu(*fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"device 'cuda': the GPUs did not answer within {_PATIENCE:g} s; see nvidia-smi"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"device 'cuda': the GPUs cannot be opened: {said}") from None
