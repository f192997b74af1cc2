"""What share of a node's arithmetic and memory bandwidth a run used, by phase. Arithmetic only, no torch.

What was done is counted: tokens fed and sampled, Forwards, (query, key) pairs. With l layers, m weights of a layer's
matrices, v those of K and V among them, h of the LM head, b bytes of an element:

    flops  = 2 (l - 1) m fed + 2 v fed + 2 (m - v + h) sampled + 4 l heads head_dim pairs
    bytes  = b (l m + h) Forwards + 2 b l kv_heads head_dim pairs of decode steps

The last layer runs on sampled tokens only, but for K and V. A Forward reads all weights once, spread over the ranks
of its replica; K and V of a chunk are taken to stay in caches. Activations are left out, so the node did at least
this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from seesaw.core.hardware import HardwareSpec
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec

Total = Callable[[str], Mapping[str, float]]
"""A field of `EngineStats` that counts by phase, summed over the sittings of a job."""


@dataclass(frozen=True, slots=True)
class PhaseUse:
    """What a phase did, and what share of the node's best that is over the phase's time."""

    seconds: float
    flops: float
    bytes: float
    arithmetic: float
    """Share of the highest rate of matrix products: MFU."""
    bandwidth: float
    """Share of the memory bandwidth."""


def phase_use(
    spec: ModelSpec, dtype: str, ranks: int, hardware: HardwareSpec, total: Total
) -> dict[str, PhaseUse]:
    """By phase, of phases with Forwards. Nothing where the profile lacks the type."""
    peak = hardware.flops.get(dtype)
    if peak is None:
        return {}
    uses = {}
    for phase, forwards in total("steps").items():
        seconds = total("wall_seconds").get(phase, 0.0)
        if not forwards or seconds <= 0:
            continue
        flops, moved = _flops(spec, total, phase), _bytes(spec, dtype, total, phase)
        uses[phase] = PhaseUse(
            seconds=seconds,
            flops=flops,
            bytes=moved,
            arithmetic=flops / (seconds * ranks * peak),
            bandwidth=moved / (seconds * ranks * hardware.bandwidth),
        )
    return uses


def _flops(spec: ModelSpec, total: Total, phase: str) -> float:
    fed, sampled = total("phase_tokens").get(phase, 0), total("phase_sampled").get(phase, 0)
    layer, kv, head = _layer(spec), _kv(spec), spec.hidden * spec.vocab
    products = (spec.layers - 1) * layer * fed + kv * fed + (layer - kv + head) * sampled
    return 2.0 * products + 4.0 * spec.heads * spec.head_dim * _pairs(spec, total, phase)


def _bytes(spec: ModelSpec, dtype: str, total: Total, phase: str) -> float:
    weights = spec.layers * _layer(spec) + spec.hidden * spec.vocab
    read = _pairs(spec, total, phase, "phase_keys_read")
    elements = weights * total("steps")[phase] + 2.0 * spec.kv_heads * spec.head_dim * read
    return elements * DTYPE_BYTES[dtype]


def _pairs(spec: ModelSpec, total: Total, phase: str, field: str = "phase_keys") -> float:
    """Over all layers. A token sees at most the window of its layer; where contexts differ this counts too many."""
    pairs, fed = float(total(field).get(phase, 0)), total("phase_tokens").get(phase, 0)
    windows = [spec.window(layer) for layer in range(spec.layers)]
    return sum(pairs if window is None else min(pairs, float(fed * window)) for window in windows)


def _layer(spec: ModelSpec) -> int:
    """Elements of one layer's matrices."""
    return 2 * spec.hidden * spec.heads * spec.head_dim + _kv(spec) + 3 * spec.hidden * spec.ffn


def _kv(spec: ModelSpec) -> int:
    return 2 * spec.hidden * spec.kv_heads * spec.head_dim
