"""What this node has, and what an engine would take of it where its user says nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from seesaw.bench.machine import machine
from seesaw.budgets import budgets
from seesaw.core.devices import CPU, DeviceKind, device_kind
from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Plan
from seesaw.core.node import Place, places_on_cores
from seesaw.device.gpus import Gpu, choose_kind, default_ranks, usable_gpus
from seesaw.options import Options
from seesaw.planning.at_hand import node_at_hand, visible_node
from seesaw.planning.profiles import default_path
from seesaw.preflight.system import available_memory


class SeenGpu(msgspec.Struct, frozen=True, kw_only=True):
    """A visible GPU, or an instance of one."""

    name: str
    memory: int
    """Bytes."""
    free: int
    catalogue: str | None
    """Its name in the planner's catalogue; None if it has no figures there."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What `LLM` and `seesaw run` take unless asked otherwise."""

    device: str
    ranks: int
    device_memory: int
    """Bytes of each rank."""
    host_kv: int
    """Bytes of the host buffer, under a plan of two phases."""
    planner: str
    """Where the planner takes the node's figures from; empty if plans are made by rule."""
    no_planner: str
    """Why plans are made by rule; empty if they are not."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """A node as it is now."""

    host: dict[str, str]
    """Processor, extensions, cores, memory, kernel."""
    free_memory: int
    """Bytes that processes may still take."""
    shared_memory: int
    """Bytes left in /dev/shm, where ranks exchange data."""
    native: bool
    """Whether the native CPU kernels could be built or are there."""
    gpus: tuple[SeenGpu, ...]
    no_gpus: str
    """Why there are none that can be used; empty if there are."""
    taken: Taken


def take_inventory(dtype: str = "bfloat16") -> Inventory:
    """Look at everything once. Builds the native kernels if that has not been done (half a minute).

    Raises `ConfigError` if `$SEESAW_DEVICE` asks for GPUs that cannot be used.
    """
    from seesaw.native.build import load

    shm = os.statvfs("/dev/shm")
    gpus, trouble = usable_gpus()
    kind = device_kind(choose_kind("auto"))
    if kind.numbered and trouble:
        raise ConfigError(trouble)  # the environment asks for what is not there
    return Inventory(
        host=machine(),
        free_memory=available_memory(),
        shared_memory=shm.f_bavail * shm.f_frsize,
        native=load() is not None,
        gpus=tuple(_seen(gpu) for gpu in gpus),
        no_gpus=trouble,
        taken=_taken(kind, gpus if kind.numbered else (), dtype),
    )


def _seen(gpu: Gpu) -> SeenGpu:
    listed = visible_node([gpu.name])
    catalogue = None if isinstance(listed, str) else listed.name
    return SeenGpu(name=gpu.name, memory=gpu.total, free=gpu.free, catalogue=catalogue)


def _taken(kind: DeviceKind, gpus: Sequence[Gpu], dtype: str) -> Taken:
    options = Options(model="", device=kind.name)
    ranks = default_ranks(kind.name, gpus=gpus)
    plan = Plan.parse(f"P{ranks}->T{ranks}")
    device_memory, host_kv = budgets(options, plan, _places(kind, ranks), gpus)
    planner, no_planner = _planner(ranks, kind.name, dtype, [gpu.name for gpu in gpus])
    return Taken(
        device=kind.name,
        ranks=ranks,
        device_memory=device_memory,
        host_kv=host_kv,
        planner=planner,
        no_planner=no_planner,
    )


def _planner(ranks: int, device: str, dtype: str, gpus: Sequence[str]) -> tuple[str, str]:
    """Where the node's figures come from, or why there are none."""
    if ranks == 1:
        return "", "one rank leaves little to choose"
    if isinstance(node_at_hand(ranks, device, dtype), HardwareSpec):
        return f"the profile {default_path()}", ""
    figures = node_at_hand(ranks, device, dtype, gpus)
    return ("", figures) if isinstance(figures, str) else (f"the catalogue's figures of {figures.name}", "")


def _places(kind: DeviceKind, ranks: int) -> Sequence[Place]:
    if kind is CPU:
        return places_on_cores(ranks, 1)
    return [Place(device=rank) for rank in range(ranks)]
