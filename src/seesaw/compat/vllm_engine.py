"""Arguments of vLLM's `LLM` as options of ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from seesaw.compat.vllm_arguments import REFUSED, WITHOUT_EFFECT
from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError, LayoutError
from seesaw.core.foreign import take_own
from seesaw.core.layout import Plan
from seesaw.device.gpus import choose_kind, visible_gpus

_DEGREES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_RENAMED = {"max_num_seqs": "max_running", "max_num_batched_tokens": "chunk"}
_DTYPES = {"half": "float16", "float": "float32"}
_GIB = 1 << 30
_HOST_SIZES = ("kv_offloading_size", "swap_space")
_SHARE = "gpu_memory_utilization"
_MAPPED = (*_DEGREES, *_RENAMED, *_HOST_SIZES, _SHARE)


def engine_options(given: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """What `given` comes to in options of ours, `own` being their names.

    Warns once of all arguments that have no effect. Raises `ConfigError` for one that is refused or that nobody
    knows, and where two say different things about the same.
    """
    own = set(own)
    options, notes = take_own(given, own | set(_MAPPED), REFUSED | WITHOUT_EFFECT, _refusal)
    _spell(options)
    _take_ranks(options)
    for theirs, ours in _RENAMED.items():
        _rename(options, theirs, ours)
    notes += _take_host_memory(options)
    notes += _take_device_memory(options)
    if notes:
        warnings.warn(f"LLM: without effect here: {', '.join(notes)}", UserWarning, stacklevel=3)
    assert set(options) <= own
    return options


def _refusal(sentence: str, _: str) -> ConfigError:
    return ConfigError(f"LLM: {sentence}")


def _spell(options: dict[str, Any]) -> None:
    """Values that vLLM spells in another way; None stands for the default."""
    for name in [name for name, value in options.items() if value is None]:
        del options[name]
    if "dtype" in options:
        dtype = str(options["dtype"]).removeprefix("torch.")
        options["dtype"] = _DTYPES.get(dtype, dtype)
    if options.get("max_model_len") in (-1, "auto"):
        del options["max_model_len"]


def _take_ranks(options: dict[str, Any]) -> None:
    """Degrees of parallelism say how many ranks there are; how these work together is the plan's matter."""
    degrees = {name: options.pop(name) for name in _DEGREES if name in options}
    if not degrees:
        return
    for name, value in degrees.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"LLM: {name}={value!r}: must be a whole number of at least 1")
    asked, ranks = (
        " × ".join(f"{name}={value}" for name, value in degrees.items()),
        math.prod(degrees.values()),
    )
    plan = options.get("plan", "auto")
    if plan != "auto" and Plan.parse(plan).world != ranks:
        raise LayoutError(
            f"LLM: plan {plan} has {Plan.parse(plan).world} ranks, but {asked}; leave the latter out"
        )
    if plan == "auto" and options.setdefault("ranks", ranks) != ranks:
        raise ConfigError(f"LLM: ranks={options['ranks']}, but {asked}; leave the latter out")


def _rename(options: dict[str, Any], theirs: str, ours: str) -> None:
    if theirs not in options:
        return
    value = options.pop(theirs)
    if options.setdefault(ours, value) != value:
        raise ConfigError(
            f"LLM: {theirs}={value} and {ours}={options[ours]} are the same setting; give one of them"
        )


def _take_host_memory(options: dict[str, Any]) -> list[str]:
    """KV in host memory, in GiB: of the node (`kv_offloading_size`), or of each GPU (`swap_space`, of older vLLM)."""
    for name in _HOST_SIZES:
        if name not in options:
            continue
        size = options.pop(name)
        if "host_kv" in options or not size:
            return [f"{name} (host_kv says how much memory the host buffer has)"]
        options["host_kv"] = int(size * _GIB) * (_ranks(options) if name == "swap_space" else 1)
    return []


def _ranks(options: Mapping[str, Any]) -> int:
    """The number of ranks as far as it is known."""
    plan = options.get("plan", "auto")
    return options.get("ranks") or (1 if plan == "auto" else Plan.parse(plan).world)


def _take_device_memory(options: dict[str, Any]) -> list[str]:
    """A share of each GPU, which its ranks have between them. A CPU's memory is shared with everybody else."""
    if _SHARE not in options:
        return []
    share = options.pop(_SHARE)
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"LLM: {_SHARE}={share!r}: must be greater than 0 and at most 1")
    if "device_memory" in options:
        return [f"{_SHARE} (device_memory is given)"]
    if not device_kind(choose_kind(options.get("device", "auto"))).numbered:
        return [
            f"{_SHARE} (ranks compute on the CPU; device_memory is the budget of each, device='cuda' takes GPUs)"
        ]
    smallest = min(gpu.total for gpu in visible_gpus())
    options["device_memory"] = int(smallest * share) // options.get("ranks_per_gpu", 1)
    return []
