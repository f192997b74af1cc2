"""Which device a rank computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from seesaw.core.devices import kind_of
from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.device.base import Device


_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of torch's allocator; the second is its name before torch 2.9, which later releases still read."""
_QUEUES = ("CUDA_DEVICE_MAX_CONNECTIONS", "32")
"""Of work to the device. With CUDA's default of eight, a message that waits for another rank would hold back other
streams that happen to share its queue."""


def _settle_environment() -> None:
    """What CUDA and torch read when the process first uses its GPU; settings of the user stay.

    The allocator's segments grow, as the memory plan counts on.
    """
    os.environ.setdefault(*_QUEUES)
    if not any(name in os.environ for name in _SETTINGS):
        os.environ[_SETTINGS[1]] = "expandable_segments:True"


def open_device(name: str) -> Device:
    """The device `name`, such as `cpu` or `cuda:0`. Raises `ConfigError` if there is none."""
    kind = kind_of(name)
    if not kind.numbered:
        from seesaw.device.cpu import CpuDevice

        return CpuDevice()
    import torch

    from seesaw.device.cuda import CudaDevice

    _settle_environment()
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        have = "none is visible" if count == 0 else f"the visible ones are cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device {name!r}: no such GPU; {have}")
    return CudaDevice(name)
