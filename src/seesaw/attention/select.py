"""Which attention backend serves a device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from seesaw.attention.base import AttentionBackend

logger = logging.getLogger(__name__)

BACKENDS = ("cpu", "torch")
"""`cpu`: native kernels for CPU ranks; `torch`: pure torch."""


def create_attention(
    device: str, name: str | None = None, *, head_dim: int | None = None
) -> AttentionBackend:
    """The backend `name` for `device` (such as `cpu`), or the best one there if no name is given.

    `cpu` is served by `torch` where the native library cannot be built, which a warning has said then, and
    for a `head_dim` that is not a multiple of 8. Raises `ConfigError` for a name or a device that no backend
    serves.
    """
    kind = device.split(":", 1)[0]
    if kind != "cpu":
        raise ConfigError(f"attention: no backend for device {device!r}; device 'cpu' is supported")
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"attention: unknown backend {name!r} for device {device!r}; use one of {BACKENDS}")
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
