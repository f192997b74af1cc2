"""The memory that each rank may use, and the host buffer, where a user says nothing or too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError
from seesaw.core.units import format_bytes, parse_bytes
from seesaw.preflight.system import available_memory

if TYPE_CHECKING:
    from seesaw.core.layout import Plan
    from seesaw.core.node import Place
    from seesaw.device.gpus import Gpu
    from seesaw.options import Options

HOST_SHARE = 0.7
"""Of the free memory of a node of CPU ranks, for the ranks and the host buffer together."""
GPU_SHARE = 0.95
"""Of a GPU's free memory that its ranks take, unless asked otherwise; the plan counts what CUDA takes of it. The rest
is for what others do there, and for what drivers take beyond their documentation."""
GPU_HOST_KV = 32 << 30
"""Bytes of the host buffer for each rank on a GPU, at most, where a node has that much."""
_CPU_HOST_KV, _STATIC_HOST_KV = 32 << 30, 4 << 30
"""At most: for CPU ranks, and where phases share batches, so that only preempted sequences go there."""


def budgets(options: Options, plan: Plan, places: Sequence[Place], gpus: Sequence[Gpu]) -> tuple[int, int]:
    """Bytes per rank and of the host buffer. Left open, they are shares of the memory that is free now.

    Raises `ConfigError` if a GPU has less free than is asked for.
    """
    free = available_memory()
    if gpus:
        return gpu_budget(options, places, gpus), _gpu_host_kv(options, plan, free)
    most = min(free // 4, _CPU_HOST_KV) if plan.separate else min(free // 10, _STATIC_HOST_KV)
    host_kv = most if options.host_kv is None else parse_bytes(options.host_kv)
    if options.device_memory is not None:
        return parse_bytes(options.device_memory), host_kv
    return max(int(free * HOST_SHARE - host_kv) // plan.world, 1), host_kv


def gpu_budget(options: Options, places: Sequence[Place], gpus: Sequence[Gpu]) -> int:
    """Bytes of each rank: its share of the GPU that has least free for each of its ranks.

    Raises `ConfigError` if what was asked for is not free.
    """
    sharing = Counter(place.device for place in places if place.device is not None)
    tightest = min(sharing, key=lambda number: gpus[number].free // sharing[number])
    gpu, ranks = gpus[tightest], sharing[tightest]
    if options.device_memory is None:
        return max(int(gpu.free * GPU_SHARE) // ranks, 1)
    asked = parse_bytes(options.device_memory)
    if asked * ranks > gpu.free:
        each = "" if ranks == 1 else f" for each of its {ranks} ranks"
        raise ConfigError(
            f"device_memory {format_bytes(asked)}{each}: of {format_bytes(gpu.total)} on GPU {tightest} "
            f"({gpu.name}), {format_bytes(gpu.free)} are free; ask for at most {format_bytes(gpu.free // ranks)}"
        )
    return asked


def _gpu_host_kv(options: Options, plan: Plan, free: int) -> int:
    """Bytes of the host buffer beside ranks on GPUs, which have no part in the host's memory otherwise."""
    if options.host_kv is not None:
        return parse_bytes(options.host_kv)
    return min(free // 2, GPU_HOST_KV * plan.world) if plan.separate else min(free // 10, _STATIC_HOST_KV)
