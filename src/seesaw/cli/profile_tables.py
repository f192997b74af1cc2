"""The tables that `seesaw profile` ends with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from seesaw.core.units import format_bytes

if TYPE_CHECKING:
    from seesaw.core.hardware import Curve, HardwareSpec

_ROWS = (1, 4, 16, 64, 256, 2048)
_SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)


def tables(spec: HardwareSpec) -> Iterator[Table]:
    """Products and attention by type, links, copies, overheads; each fits into 100 columns."""
    yield _products(spec)
    yield _attention(spec)
    if spec.ranks > 1:
        yield _links(spec)
    yield _memory(spec)


def _products(spec: HardwareSpec) -> Table:
    title = f"{spec.ranks} x {spec.name}: matrix products, GFLOP/s of a rank by rows"
    table = _table(title, "type", *map(str, _ROWS), "weights GB/s")
    for dtype, peak in spec.flops.items():
        curve = spec.curves(dtype).product
        rates = [f"{peak * curve(rows) / 1e9:,.1f}" for rows in _ROWS]
        streamed = peak * curve(1) * _element_bytes(dtype) / 2
        table.add_row(dtype, *rates, f"{streamed / 1e9:.1f}")
    return table


def _attention(spec: HardwareSpec) -> Table:
    table = _table(
        "attention of a rank, with much to do",
        "type",
        "prefill GFLOP/s",
        "us a token and 1,024 channels of Q",
        "of K",
        "decode GB/s of KV",
    )
    for dtype, peak in spec.flops.items():
        curves = spec.curves(dtype)
        table.add_row(
            dtype,
            f"{peak * curves.prefill_attention.values[-1] / 1e9:,.1f}",
            f"{curves.token_of_query * 1024e6:.2f}",
            f"{curves.token_of_kv * 1024e6:.2f}",
            f"{spec.bandwidth * curves.decode_attention.values[-1] / 1e9:.1f}",
        )
    return table


def _links(spec: HardwareSpec) -> Table:
    table = _table("links, microseconds", "", *map(format_bytes, _SIZES))
    for ranks, curve in spec.all_reduce.items():
        table.add_row(f"all-reduce of {ranks}", *_microseconds(curve))
    table.add_row("hand-over", *_microseconds(spec.send))
    return table


def _microseconds(curve: Curve) -> Iterable[str]:
    return (f"{curve(size) * 1e6:,.0f}" for size in _SIZES)


def _memory(spec: HardwareSpec) -> Table:
    table = _table("copies and overheads", "", "one rank alone", "all ranks")
    for name, alone, together in (
        ("host to device", spec.to_device, spec.node_to_device),
        ("device to host", spec.to_host, spec.node_to_host),
    ):
        table.add_row(f"{name}, GB/s", f"{alone / 1e9:.1f}", f"{together / 1e9:.1f}")
    if spec.fetch is not None:
        table.add_row("weights from the host, GB/s", "", f"{spec.fetch * spec.ranks / 1e9:.1f}")
    table.add_row("weights within a device, GB/s", "", f"{spec.device_copy * spec.ranks / 1e9:.1f}")
    activations = spec.activation_bandwidth or spec.bandwidth
    table.add_row("norms and the like, GB/s", "", f"{activations * spec.ranks / 1e9:.1f}")
    for ranks, shares in spec.waiting.items():
        name = f"waiting for the slowest of {ranks}, % of a millisecond's work"
        table.add_row(name, "", f"{100 * shares(1e-3):.1f}")
    table.add_row("an operator, us", f"{spec.operator_overhead * 1e6:.1f}", "")
    table.add_row("a layer beside its operators, us", f"{spec.layer_overhead * 1e6:.1f}", "")
    table.add_row("a step, us", f"{spec.step_overhead * 1e6:.0f}", "")
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _element_bytes(dtype: str) -> int:
    from seesaw.core.model_spec import DTYPE_BYTES

    return DTYPE_BYTES[dtype]
