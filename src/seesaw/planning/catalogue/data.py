"""The catalogue's files, as types. Figures keep the units in which they are published; `compose` converts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from seesaw.core.hardware import Curve

FOLDER = Path(__file__).parent


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `devices.toml`."""

    name: str
    aliases: tuple[str, ...] = ()
    memory_mib: int
    bandwidth: float
    """GB/s, published."""
    tflops: dict[str, float]
    """Published dense peaks by type, in TFLOP/s."""
    sustained: float | None = None
    """TFLOP/s in bfloat16 that large products hold, where the fit is of another device."""
    products: str
    """Name of the fit that products and bandwidth take."""
    attention: str
    """Name of the fit that attention takes."""
    link: str
    """Between the devices of a node."""
    host_link: str
    box: str
    """Name of the measured node whose links a node of these takes."""
    sources: dict[str, str]


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `links.toml`."""

    name: str
    rate: float
    """GB/s one way."""
    host_memory: float | None = None
    """GB/s to all of a node's devices together; None where the link does not lead to the host."""
    source: str


class Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of `links.toml`."""

    copy_share: float
    """Share of the host link's rate that copies reach."""
    copy_share_source: str
    host_memory_source: str
    links: tuple[Link, ...]


class Products(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How matrix products run on a measured device."""

    bandwidth_share: float
    """Of the published bandwidth, at which a product of one row streams its weights."""
    operator_overhead: float
    """Seconds."""
    share: Curve
    """Of the bfloat16 peak, by rows, where arithmetic bounds."""
    source: str


class Attention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How attention runs on a measured device."""

    peak_ratio: float
    """Of the bfloat16 to the float32 peak: how much softmax weighs beside the products."""
    float32: float
    """TFLOP/s, published."""
    bandwidth: float
    """GB/s that products stream at."""
    prefill: Curve
    """Share of the bfloat16 peak, by flops of one layer's attention over the whole batch."""
    decode: Curve
    """Share of `bandwidth`, by bytes of K and V read in one layer."""
    source: str


class Box(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The links of a measured node."""

    link: str
    all_reduce: dict[int, Curve]
    """Seconds by bytes, by ranks."""
    send: Curve
    """Seconds by bytes, one pair alone."""
    source: str
    send_source: str


class Fits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of `curves.json`, which `benchmarks/fit_catalogue.py` writes."""

    step_overhead: float
    """Seconds."""
    step_overhead_source: str
    products: dict[str, Products]
    attention: dict[str, Attention]
    boxes: dict[str, Box]


class _Devices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: tuple[Device, ...]


@cache
def devices() -> dict[str, Device]:
    """By name, in the order of the file."""
    found = msgspec.toml.decode((FOLDER / "devices.toml").read_bytes(), type=_Devices)
    return {device.name: device for device in found.devices}


@cache
def links() -> Links:
    """The interconnects and what is assumed of the host's side of them."""
    return msgspec.toml.decode((FOLDER / "links.toml").read_bytes(), type=Links)


@cache
def fits() -> Fits:
    """The fitted curves and tables."""
    return msgspec.json.decode((FOLDER / "curves.json").read_bytes(), type=Fits)
