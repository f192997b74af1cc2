"""Kinds of device that ranks compute on, as values whose properties say what others need to know of them.

Nobody but the folders that drive a device (`device`, `attention`, `kv`, `weights`, `execution`) compares names of
devices: who must decide something asks a property here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seesaw.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """What holds for all ranks on such devices."""

    name: Literal["cpu", "cuda"]
    title: str
    """Such as `CPU`, in sentences."""
    on_host: bool
    """Whether a rank computes on the host's cores, in the host's memory: budgets are shares of the same memory."""
    numbered: bool
    """Whether each rank has a device with a number, such as `cuda:1`."""
    pins_memory: bool
    """Whether host memory is locked for copies to and from the device."""
    runs_behind: bool
    """Whether the host runs ahead of the device, so that time is told by the device's own events."""
    transport: Literal["nccl"] | None
    """What connects devices without the host, given one rank to each; None where there is no such thing."""
    float16: bool
    """Whether it computes in float16; where it does not, such checkpoints run in bfloat16."""

    def device_name(self, number: int | None) -> str:
        """Of the device with that number among those visible: `cpu`, `cuda:1`."""
        if not self.numbered:
            return self.name
        assert number is not None, f"a rank on {self.name} without a device"
        return f"{self.name}:{number}"


CPU = DeviceKind(
    name="cpu",
    title="CPU",
    on_host=True,
    numbered=False,
    pins_memory=False,
    runs_behind=False,
    transport=None,
    float16=False,
)
CUDA = DeviceKind(
    name="cuda",
    title="GPU",
    on_host=False,
    numbered=True,
    pins_memory=True,
    runs_behind=True,
    transport="nccl",
    float16=True,
)
KINDS = {kind.name: kind for kind in (CPU, CUDA)}


def device_kind(name: str) -> DeviceKind:
    """The kind called `name`. Raises `ConfigError`."""
    for kind in KINDS.values():
        if kind.name == name:
            return kind
    known = " and ".join(map(repr, KINDS))
    base, colon, _ = name.partition(":")
    if colon and base in KINDS:
        raise ConfigError(
            f"device {name!r}: name the kind alone, {base!r}: ranks take the visible devices in turn, and "
            "CUDA_VISIBLE_DEVICES says which are visible"
        )
    raise ConfigError(f"device {name!r}: {known} are supported")


def kind_of(device: str) -> DeviceKind:
    """The kind of a rank's device, such as `cuda:1`. Raises `ConfigError`."""
    return device_kind(device.partition(":")[0])
