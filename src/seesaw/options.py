"""`Options`: what a user may ask of an engine, before anything is known of the model and the node."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.planning.memory import TransitionMode
from seesaw.recording.trace import check_trace

LoadFormat = Literal["auto", "safetensors", "dummy"]
PreflightMode = Literal["off", "limits", "on"]
"""What the engine checks before its ranks start: nothing; memory and limits; communication as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may ask of an engine; None leaves the choice to Seesaw."""

    model: str
    """A directory with `config.json` and safetensors files."""
    plan: str = "auto"
    """Such as `P4->T4` or `T4`; `auto` plans by the first rows where the figures of the node are known, by its
    profile or the catalogue, else by rule."""
    ranks: int | None = None
    device: str = "auto"
    """What a rank computes on: `cpu`, or `cuda` for NVIDIA GPUs; `auto` is `cuda` where there are such."""
    ranks_per_gpu: int = 1
    """Ranks that share a GPU, for trying plans out: rank r computes on the (r // ranks_per_gpu)th visible one."""
    device_memory: int | str | None = None
    """Budget per rank, in bytes or as `"8GiB"`."""
    host_kv: int | str | None = None
    """Budget of the host KV buffer of the node."""
    dtype: str = "auto"
    load_format: str = "auto"
    policy: str | None = None
    max_model_len: int | None = None
    seed: int = 0
    chunk: int | None = None
    """Most tokens of a batch that holds prefill; by default 2048 shared out over the pipeline stages of prefill."""
    max_running: int | None = None
    """Most sequences decoding at once on one replica; by default 256, or what plan `auto` finds best."""
    block_size: int = 16
    transition: str = "auto"
    overlap: bool = True
    threads_per_rank: int = 1
    attention: str | None = None
    transport: str = "auto"
    """How tensors travel between ranks: `auto`, `nccl` (a GPU for each rank), `nccl-no-p2p` (the same, by way of host
    memory), `shm`, `tcp` (ranks with addresses of their own) or `gloo`; the last three are not NCCL's."""
    node: str | None = None
    """A JSON file that places each rank in a network namespace, control groups and cores (`core.node`)."""
    start_timeout: float = 120.0
    on_rank_loss: str = "continue"
    """When a rank dies or hangs: `continue` with those that are left, or `stop`."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life after which a rank is taken for lost."""
    preflight: str = "off"
    """What is checked before ranks start: `off`, `limits` (memory), or `on` (that ranks can really talk, too)."""
    profile: str | None = None
    """A folder to which each rank writes where its time went, by phase and function (`rank0.json`, …)."""
    trace: str | None = None
    """A file for a Chrome trace of ranks and scheduler, which Perfetto opens; `.json` or `.json.gz`."""


def check_options(options: Options) -> None:
    """Raise `ConfigError` for a value that no engine can have, whatever the model and the node."""
    if options.profile is not None and not Path(options.profile).is_dir():
        raise ConfigError(f"profile {options.profile!r}: no such folder; make it first")
    if options.trace is not None:
        check_trace(options.trace)
    kind = device_kind(options.device)
    if options.ranks_per_gpu != 1 and not kind.numbered:
        raise ConfigError(f"ranks_per_gpu={options.ranks_per_gpu}: device {kind.name!r} has no GPUs to share")
    choices = {
        "dtype": ("auto", *DTYPE_BYTES),
        "load_format": get_args(LoadFormat),
        "transition": ("auto", *get_args(TransitionMode)),
        "on_rank_loss": ("continue", "stop"),
        "preflight": get_args(PreflightMode),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ConfigError(f"{name} {getattr(options, name)!r}: choose one of {', '.join(allowed)}")
    for name in (
        "ranks",
        "max_model_len",
        "chunk",
        "max_running",
        "block_size",
        "threads_per_rank",
        "ranks_per_gpu",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
