"""Which operators serve a device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from seesaw.ops.base import Operators

logger = logging.getLogger(__name__)

BACKENDS = ("cpu", "torch")
"""`cpu`: native kernels for CPU ranks; `torch`: pure torch, on every device."""


def create_operators(device: str, name: str | None = None, *, dtype: torch.dtype | None = None) -> Operators:
    """The operators `name` for `device` (such as `cpu` or `cuda:0`), or the best ones there if no name is given.

    `cpu` is served by `torch` where the native library cannot be built, which a warning has said then, and for
    a `dtype` other than float32, bfloat16 and float16. Raises `ConfigError` for a name or a device that no
    operators serve.
    """
    kind = device.split(":", 1)[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"operators: none for device {device!r}; devices 'cpu' and 'cuda' are supported")
    names = BACKENDS if kind == "cpu" else ("torch",)
    if name is not None and name not in names:
        raise ConfigError(f"operators: unknown name {name!r} for device {device!r}; use one of {names}")
    from seesaw.ops.torch_ops import TorchOperators

    if kind != "cpu" or name == "torch":
        return TorchOperators()
    from seesaw.native.build import load
    from seesaw.ops.cpu import DTYPES, CpuOperators

    if dtype is not None and dtype not in DTYPES:
        logger.info("operators: pure torch, since the native kernels do not take %s", dtype)
        return TorchOperators()
    library = load()
    return TorchOperators() if library is None else CpuOperators(library)
