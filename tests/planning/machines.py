"""Made-up hardware and models whose costs can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seesaw.core.hardware import Curve, HardwareSpec
from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.planning.shapes import PlannedModel

FLAT = Curve((1.0,), (1.0,))


def line(latency: float, rate: float) -> Curve:
    """Seconds of a transfer by bytes."""
    sizes = tuple(4.0**i for i in range(5, 20))
    return Curve(sizes, tuple(latency + size / rate for size in sizes), extends=True)


def hardware(**changes: Any) -> HardwareSpec:
    """1 TFLOP/s, 10 GB/s, links of 1 GB/s; nothing costs extra and nothing falls short of its peak."""
    fields: dict[str, Any] = {
        "name": "made up",
        "ranks": 8,
        "device": "cpu",
        "memory": 1 << 32,
        "flops": {"bfloat16": 1e12, "float32": 1e11},
        "bandwidth": 1e10,
        "product": FLAT,
        "prefill_attention": FLAT,
        "decode_attention": FLAT,
        "operator_overhead": 0.0,
        "step_overhead": 0.0,
        "all_reduce": {n: line(1e-5, 1e9 / n) for n in (2, 4, 8)},
        "send": line(1e-5, 1e9),
        "to_device": 2e9,
        "to_host": 2e9,
        "node_to_device": 4e9,
        "node_to_host": 4e9,
        "device_copy": 5e9,
    }
    return HardwareSpec(**(fields | changes))


SPEC = ModelSpec(
    family="llama",
    layers=8,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=64,
    ffn=2816,
    vocab=32000,
    max_position=4096,
    rms_eps=1e-5,
    rope=RopeSpec(),
)


def model(**changes: Any) -> PlannedModel:
    """A Llama of 8 layers."""
    return PlannedModel(name="made up", spec=replace(SPEC, **changes))
