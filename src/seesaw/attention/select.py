"""Which attention backend serves a device."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError
from seesaw.native.triton_here import missing_for_triton

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from seesaw.attention.base import AttentionBackend
    from seesaw.attention.triton_backend import TritonAttention

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": ("cpu", "torch"), "cuda": ("flashinfer", "triton", "torch")}
"""By kind of device, the best first. `cpu`: native kernels; `flashinfer`: that library; `triton`: Triton kernels and
torch's flash attention; `torch`: pure torch."""

_LEAST_CAPABILITY = (8, 0)


class _Unusable(Exception):
    """Why a backend cannot serve, for a log line or a `ConfigError`."""


def create_attention(
    device: str,
    name: str | None = None,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionBackend:
    """The backend `name` for `device` (such as `cpu` or `cuda:0`), or the best one there if no name is given.

    `head_dim` and `dtype` are the model's, as far as known. `cpu` is served by `torch` where the native library
    cannot be built, which a warning has said then, and for a `head_dim` that is not a multiple of 8. On a CUDA
    device the choice is logged with its reason. Raises `ConfigError` for a name or a device that no backend
    serves, and for `flashinfer` or `triton` by name where it cannot run.
    """
    kind = device.split(":", 1)[0]
    if kind not in BACKENDS:
        raise ConfigError(
            f"attention: no backend for device {device!r}; devices 'cpu' and 'cuda' are supported"
        )
    if name is not None and name not in BACKENDS[kind]:
        raise ConfigError(
            f"attention: unknown backend {name!r} for device {device!r}; use one of {BACKENDS[kind]}"
        )
    if kind == "cuda":
        return _on_cuda(device, name, head_dim, dtype)
    return _on_cpu(name, head_dim)


def _on_cpu(name: str | None, head_dim: int | None) -> AttentionBackend:
    from seesaw.attention.cpu import CpuAttention
    from seesaw.attention.torch_backend import TorchAttention
    from seesaw.native.build import load

    if name != "torch" and head_dim is not None and head_dim % 8:
        logger.info(
            "attention: pure torch, since the native kernels need a head_dim in eights, not %d", head_dim
        )
        name = "torch"
    library = load() if name != "torch" else None
    return TorchAttention() if library is None else CpuAttention(library)


def _on_cuda(
    device: str, name: str | None, head_dim: int | None, dtype: torch.dtype | None
) -> AttentionBackend:
    """The first backend that can serve, or the one that is named."""
    create = {"flashinfer": _flashinfer, "triton": _triton, "torch": _torch}
    reasons = []
    for candidate in BACKENDS["cuda"] if name is None else (name,):
        try:
            backend, how = create[candidate](device, head_dim, dtype)
        except _Unusable as problem:
            if name is not None:
                others = " or ".join(repr(other) for other in BACKENDS["cuda"] if other != name)
                raise ConfigError(
                    f"attention: {name!r} cannot serve {device!r}: {problem}; use {others}, or no name"
                ) from None
            reasons.append(f"not {candidate}: {problem}")
            continue
        level = logging.WARNING if name is None and candidate == "torch" else logging.INFO
        if name is not None:
            reasons.append("asked for by name")
        logger.log(level, "attention on %s: %s", device, "; ".join([how, *reasons]))
        return backend
    raise AssertionError("pure torch serves everywhere")


def _flashinfer(device: str, head_dim: int | None, dtype: torch.dtype | None) -> tuple[AttentionBackend, str]:
    if importlib.util.find_spec("flashinfer") is None:
        raise _Unusable("it is not installed (`pip install flashinfer-python`)")
    own, _ = _triton(device, head_dim, dtype)
    from seesaw.attention.flashinfer_backend import HEAD_DIMS, FlashInferAttention
    from seesaw.attention.trial import try_backend

    if head_dim is not None and head_dim not in HEAD_DIMS:
        raise _Unusable(f"its kernels are for a head_dim of {_listed(HEAD_DIMS)}, not {head_dim}")
    if dtype is not None and dtype.itemsize != 2:
        raise _Unusable(f"its kernels are for bfloat16 and float16, not {_name(dtype)}")
    logger.info("attention on %s: trying flashinfer, which may compile its kernels for minutes once", device)
    try:
        backend = FlashInferAttention(importlib.import_module("flashinfer"), own)
        try_backend(backend, device, head_dim or 128, dtype)
    except Exception as error:  # a library that is not ours may fail in any way
        raise _Unusable(f"it failed when tried: {_first_line(error)}") from error
    return backend, "flashinfer; decode in CUDA graphs by Triton kernels, since flashinfer plans on the host"


def _triton(device: str, head_dim: int | None, dtype: torch.dtype | None) -> tuple[TritonAttention, str]:
    import torch

    missing = missing_for_triton()
    if missing is not None:
        raise _Unusable(missing)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _Unusable(f"its kernels are for float32, bfloat16 and float16, not {_name(dtype)}")
    capability, processors = _examine(device)
    if capability < _LEAST_CAPABILITY:
        raise _Unusable("its kernels need compute capability 8.0, this device has {}.{}".format(*capability))
    from seesaw.attention.trial import try_backend
    from seesaw.attention.triton_backend import TritonAttention

    whole_prompts, how = _whole_prompts(device, head_dim, dtype)
    backend = TritonAttention(processors, whole_prompts=whole_prompts)
    try:
        try_backend(backend, device, head_dim or 128, dtype)
    except Exception as error:  # compilers fail in many ways
        raise _Unusable(f"its kernels failed when tried: {_first_line(error)}") from error
    return backend, f"Triton kernels over the pool; {how}"


def _whole_prompts(
    device: str, head_dim: int | None, dtype: torch.dtype | None
) -> tuple[Callable[..., Tensor] | None, str]:
    """Torch's flash attention if it works here, and what is said of it."""
    from seesaw.attention.trial import try_whole_prompts
    from seesaw.attention.whole_prompts import find_whole_prompts

    if dtype is not None and dtype.itemsize != 2:
        return None, f"prompts too, since flash attention does not take {_name(dtype)}"
    found = find_whole_prompts(head_dim)
    if isinstance(found, str):
        return None, f"prompts too: {found}"
    try:
        try_whole_prompts(found, device, head_dim or 128, dtype)
    except RuntimeError as error:
        return None, f"prompts too: torch's flash attention failed when tried: {_first_line(error)}"
    return found, "prompts without a context by torch's flash attention"


def _torch(device: str, head_dim: int | None, dtype: torch.dtype | None) -> tuple[AttentionBackend, str]:
    from seesaw.attention.torch_backend import TorchAttention

    return TorchAttention(), "pure torch, one sequence at a time, which is slow"


def _examine(device: str) -> tuple[tuple[int, int], int]:
    """Compute capability and streaming multiprocessors of a device. Raises `ConfigError` if it is not there."""
    import torch

    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"attention: device {device!r} cannot be used: {_first_line(error)}") from None
    return (properties.major, properties.minor), properties.multi_processor_count


def _listed(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
