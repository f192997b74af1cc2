"""Which operators serve a device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from seesaw.ops.base import Operators

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
"""By kind of device, the best first. `cpu`: native kernels; `triton`: fused Triton kernels; `torch`: pure torch."""


def create_operators(device: str, name: str | None = None, *, dtype: torch.dtype | None = None) -> Operators:
    """The operators `name` for `device` (such as `cpu` or `cuda:0`), or the best ones there if no name is given.

    Both kinds of kernels take float32, bfloat16 and float16; `torch` serves every other `dtype`. `cpu` is
    served by `torch` where the native library cannot be built, which a warning has said then; without a
    name, a CUDA device is served by `torch` where Triton cannot run. Raises `ConfigError` for a name or a
    device that no operators serve, and for `triton` by name where it cannot run.
    """
    kind = device.split(":", 1)[0]
    if kind not in BACKENDS:
        raise ConfigError(f"operators: none for device {device!r}; devices 'cpu' and 'cuda' are supported")
    names = BACKENDS[kind]
    if name is not None and name not in names:
        raise ConfigError(f"operators: unknown name {name!r} for device {device!r}; use one of {names}")
    create = {"cpu": _native, "triton": _triton, "torch": _torch}[name or names[0]]
    return create(dtype, name is not None)


def _torch(dtype: torch.dtype | None = None, required: bool = False) -> Operators:
    from seesaw.ops.torch_ops import TorchOperators

    return TorchOperators()


def _native(dtype: torch.dtype | None, required: bool) -> Operators:
    from seesaw.native.build import load
    from seesaw.ops.cpu import DTYPES, CpuOperators

    if dtype is not None and dtype not in DTYPES:
        logger.info("operators: pure torch, since the native kernels do not take %s", dtype)
        return _torch()
    library = load()
    return _torch() if library is None else CpuOperators(library)


def _triton(dtype: torch.dtype | None, required: bool) -> Operators:
    from seesaw.native.triton_here import missing_for_triton

    missing = missing_for_triton()
    if missing is not None:
        if required:
            raise ConfigError(f"operators: 'triton' cannot run: {missing}; or use 'torch'")
        logger.warning("operators: pure torch, slower than fused kernels: %s", missing)
        return _torch()
    from seesaw.ops.triton_ops import DTYPES, TritonOperators

    if dtype is not None and dtype not in DTYPES:
        logger.info("operators: pure torch, since the Triton kernels do not take %s", dtype)
        return _torch()
    logger.info("operators: fused Triton kernels; matrix products by torch")
    return TritonOperators()
