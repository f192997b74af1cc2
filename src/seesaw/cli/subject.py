"""What `seesaw plan` and `seesaw simulate` are asked about: model, node and workload, from what was typed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError
from seesaw.core.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from seesaw.core.hardware import HardwareSpec
    from seesaw.core.model_spec import DType
    from seesaw.planning.shapes import PlannedModel
    from seesaw.planning.workloads import Workload

DEFAULT_WORKLOAD = "sharegpt"
DRIVER_MEMORY = 512 << 20
"""Bytes of a GPU that its driver keeps from all processes, beside `DRIVER_SHARE` of them: that leaves 21.9 GiB of the
22.5 that `nvidia-smi` shows of an L4, where torch reports 22.0, and 79.1 of an A100's 80, as torch reports."""
DRIVER_SHARE = 1 / 200
HOST_KV = 32 << 30
"""Bytes of the host buffer for each GPU, unless asked for. Nodes of eight have 256 GiB to 1 TiB of host memory."""
CPU_HOST_KV = 32 << 30
"""At most, of a node of CPU ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Model, node and workload, and what was assumed of them."""

    model: PlannedModel
    hardware: HardwareSpec
    profile: Path | None
    """Where the node's figures were measured into; None for the catalogue."""
    workload: Workload
    device_memory: int
    """Bytes of each rank that a plan may use."""
    host_kv: int
    """Bytes of the host buffer."""
    dtype: DType
    """Of computation."""
    notes: tuple[str, ...]


def resolve(
    *,
    model: str,
    hardware: str | None,
    workload: str | None,
    requests: int | None,
    weights: str | None,
    kv: str | None,
    seed: int,
    arrivals: bool,
    device_memory: str | None,
    host_kv: str | None,
    max_model_len: int | None = None,
) -> Subject:
    """Look everything up. Raises `ConfigError` in one sentence.

    Requests beyond `max_model_len`, or the model's context, are left out.
    """
    from seesaw.planning.shapes import shape
    from seesaw.planning.workloads import workload as read_workload

    planned = shape(model, weights=weights, kv=kv or (weights if weights == "float32" else None))
    node, profile = _node(hardware)
    job = read_workload(workload or DEFAULT_WORKLOAD, requests, seed)
    job = job.within(max_model_len or planned.spec.max_position)
    budgets, notes = _budgets(node, size("--device-memory", device_memory), size("--host-kv", host_kv))
    if workload is None:
        notes.append(f"no --workload given: {DEFAULT_WORKLOAD} is assumed; your own job file plans better")
    if job.arrival_s is not None and not arrivals:
        job = replace(job, arrival_s=None)
        notes.append("arrival times are left aside: all requests are there from the start")
    notes += _of_the_engine(planned)
    return Subject(
        model=planned,
        hardware=node,
        profile=profile,
        workload=job,
        device_memory=budgets[0],
        host_kv=budgets[1],
        dtype=_dtype(planned, node),
        notes=tuple(notes),
    )


def _node(text: str | None) -> tuple[HardwareSpec, Path | None]:
    """The node, and the file of its profile unless it comes from the catalogue."""
    from seesaw.planning.catalogue import hardware
    from seesaw.planning.profiles import default_path, load_profile

    if text is None:
        path = default_path()
        return (load_profile(path), path) if path.exists() else (_visible_node(path), None)
    if text.lower().endswith(".json") or Path(text).is_file():
        return load_profile(Path(text)), Path(text)
    return hardware(text), None


def _visible_node(path: Path) -> HardwareSpec:
    """The GPUs of this box by the catalogue, where there is no profile at `path`. Raises `ConfigError`."""
    from seesaw.device.gpus import has_driver, visible_gpus
    from seesaw.planning.at_hand import visible_node

    why = "it has no GPUs"
    if has_driver():  # no torch is needed to plan
        found = visible_node([gpu.name for gpu in visible_gpus()])
        if not isinstance(found, str):
            return found
        why = found
    raise ConfigError(
        f"no --hardware given, this box has no profile ({path}), and {why}: measure it with `seesaw profile`, or "
        "name a node of the catalogue, such as --hardware 8xL4"
    )


def _dtype(model: PlannedModel, node: HardwareSpec) -> DType:
    """What products are computed in. Raises `ConfigError` if the node's figures do not cover it."""
    dtype: DType = "float32" if model.weight_bits == 32 else "bfloat16"
    if dtype not in node.flops:
        raise ConfigError(
            f"the figures of {node.name} are for products in {', '.join(node.flops)}, not in {dtype}: measure "
            f"it with `seesaw profile --dtype {dtype}`, or plan with --weights {next(iter(node.flops))}"
        )
    return dtype


def _budgets(node: HardwareSpec, device: int | None, host: int | None) -> tuple[tuple[int, int], list[str]]:
    """Bytes of a rank and of the host buffer, and what was assumed where they are not given.

    On CPU ranks, whose memory is the host's as well, the shares are those that the engine takes of free memory.
    """
    notes, memory = [], node.memory * node.ranks
    if host is None:
        host = min(memory // 4, CPU_HOST_KV) if device_kind(node.device).on_host else HOST_KV * node.ranks
        notes.append(f"a host buffer of {format_bytes(host)} is assumed; --host-kv says otherwise")
    if device is None and device_kind(node.device).on_host:
        device = max(int(memory * 0.7 - host) // node.ranks, 1)
        notes.append(f"a budget of {format_bytes(device)} a rank is assumed; --device-memory says otherwise")
    elif device is None:
        device = max(int(node.memory * (1 - DRIVER_SHARE)) - DRIVER_MEMORY, 1)
    return (device, host), notes


def _of_the_engine(model: PlannedModel) -> list[str]:
    """What can be planned for and not be run yet."""
    notes = []
    if model.moe is not None:
        notes.append("this version's engine does not run mixtures of experts")
    if model.weight_bits not in (16, 32) or model.kv_bits not in (16, 32):
        notes.append("this version's engine does not run quantised weights or KV")
    return notes


def size(option: str, text: str | None) -> int | None:
    """Bytes of an option, or None. Raises `ConfigError` naming the option."""
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error


def write(path: Path, text: str, option: str) -> None:
    """Write a file that an option names. Raises `ConfigError` if that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from error
