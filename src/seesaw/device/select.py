"""Which device a rank computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.device.base import Device


_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of torch's allocator; the second is its name before torch 2.9, which later releases still read."""


def _grow_segments() -> None:
    """Let the allocator's segments grow, as the memory plan counts on, unless its user has settings of their own.

    Called before the process uses its GPU, when the allocator reads them.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ[_SETTINGS[1]] = "expandable_segments:True"


def open_device(name: str) -> Device:
    """The device `name`, such as `cpu` or `cuda:0`. Raises `ConfigError` if there is none."""
    kind = name.split(":", 1)[0]
    if kind == "cpu":
        from seesaw.device.cpu import CpuDevice

        return CpuDevice()
    if kind == "cuda":
        import torch

        from seesaw.device.cuda import CudaDevice

        _grow_segments()
        count = torch.cuda.device_count()
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            have = "none is visible" if count == 0 else f"the visible ones are cuda:0 to cuda:{count - 1}"
            raise ConfigError(f"device {name!r}: no such GPU; {have}")
        return CudaDevice(name)
    raise ConfigError(f"device {name!r}: 'cpu' and 'cuda' are supported")
