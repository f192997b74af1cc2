"""The hardware catalogue: what names mean, that figures are in order, that curves reproduce measurements."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec
import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import Curve, HardwareSpec
from seesaw.planning.at_hand import visible_node
from seesaw.planning.catalogue import hardware, names
from seesaw.planning.catalogue.data import devices, fits, links

SIZES = [4 << 10, 64 << 10, 1 << 20, 32 << 20, 1 << 30]
SHARES = ("product", "prefill_attention", "decode_attention")
PCIE = [name for name, device in devices().items() if device.link.startswith("pcie")]
PCIE_LINKS = [link.name for link in links().links if link.host_memory]


@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
@pytest.mark.parametrize("name", names())
def test_every_device_composes(name: str, ranks: int) -> None:
    spec = hardware(f"{ranks}x{name}")
    assert (spec.name, spec.ranks, spec.device) == (name, ranks, "cuda")
    assert list(spec.all_reduce) == list(range(2, ranks + 1))
    assert {"bfloat16", "float16", "float32", "int8"} <= spec.flops.keys()
    assert spec.flops["float32"] < spec.flops["bfloat16"] < spec.flops["int8"]
    assert spec.to_device <= spec.node_to_device <= ranks * spec.to_device
    assert msgspec.json.decode(msgspec.json.encode(spec), type=HardwareSpec) == spec


@pytest.mark.parametrize("name", names())
def test_every_figure_has_a_source(name: str) -> None:
    optional = {field.name for field in msgspec.structs.fields(HardwareSpec) if not field.required}
    figures = set(HardwareSpec.__struct_fields__) - {"name", "ranks", "device"} - optional
    sources = hardware(name).sources
    assert sources.keys() == figures
    assert all(sources.values())


@pytest.mark.parametrize(
    ("text", "name", "ranks"),
    [
        ("8xL4", "L4", 8),
        ("4 X a10", "A10", 4),
        ("8×L40s", "L40S", 8),
        ("8xA100-40G-SXM", "A100-40G-SXM", 8),
        ("a100-80gb-pcie", "A100-80G-PCIe", 1),
        ("NVIDIA A100-SXM4-80GB", "A100-80G-SXM", 1),
        ("NVIDIA H100 80GB SXM5", "H100-SXM", 1),
        ("2xh200-sxm", "H200", 2),
        ("rtx4090", "RTX-4090", 1),
        ("2x4090", "RTX-4090", 2),
        ("NVIDIA GeForce RTX 3090", "RTX-3090", 1),
        ("RTXPRO6000", "RTX-PRO-6000", 1),
        ("2x RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000", 2),
    ],
)
def test_names_people_write(text: str, name: str, ranks: int) -> None:
    spec = hardware(text)
    assert (spec.name, spec.ranks) == (name, ranks)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    ],
)
def test_names_drivers_give(driver: str, name: str) -> None:
    found = visible_node([driver] * 4)
    assert isinstance(found, HardwareSpec) and (found.name, found.ranks) == (name, 4)


def test_gpus_without_figures() -> None:
    assert "GPU 'Tesla T4' is not in the catalogue; near it: L4" in str(visible_node(["Tesla T4"]))
    assert "several models (NVIDIA L4, NVIDIA A10)" in str(visible_node(["NVIDIA L4", "NVIDIA A10"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xL5", ["'L5'", "L4", "L20"]),
        ("8xH10", ["'H10'", "A10", "H100-SXM"]),
        ("A100", ["A100-40G-PCIe", "A100-80G-PCIe", "A100-40G-SXM", "A100-80G-SXM"]),
        ("RTX 6000", ["RTX-PRO-6000"]),
        ("4xzzzz", ["L40S", "H200", "RTX-3090"]),
        ("8xL4@pcie6x16", ["'pcie6x16'", "pcie5x16"]),
        ("8xL4@", ["nvlink3"]),
        ("8xL4@pcie4x8/l40", ["'l40'", "L40S"]),
        ("0xL4", ["from 1 to 64"]),
        ("65xL4", ["65 ranks", "from 1 to 64"]),
        ("", ["8xL4"]),
    ],
)
def test_errors_say_what_would_work(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        hardware(text)
    assert all(word in str(caught.value) for word in words)


def large_products(name: str) -> float:
    spec = hardware(name)
    return spec.flops["bfloat16"] * spec.product(4096)


def test_devices_are_in_a_sane_order() -> None:
    bandwidths = [
        hardware(n).bandwidth
        for n in ("H200", "H100-SXM", "A100-80G-SXM", "A100-40G-SXM", "L40S", "A40", "A10", "L4")
    ]
    assert bandwidths == sorted(bandwidths, reverse=True)
    rates = [large_products(n) for n in ("H100-SXM", "H100-PCIe", "A100-80G-SXM", "L40S", "A40", "A10", "L4")]
    assert rates == sorted(rates, reverse=True)
    assert large_products("A100-80G-SXM") > large_products("A100-80G-PCIe") > large_products("A100-40G-PCIe")
    memories = [
        hardware(n).memory for n in ("H200", "RTX-PRO-6000", "A100-80G-SXM", "L40S", "RTX-5090", "L4")
    ]
    assert memories == sorted(memories, reverse=True)


@pytest.mark.parametrize("name", names())
def test_nothing_beats_what_is_published(name: str) -> None:
    spec, device = hardware(name), devices()[name]
    assert spec.bandwidth <= device.bandwidth * 1e9
    for share in ("product", "prefill_attention"):
        assert max(getattr(spec, share).values) <= 1
    assert max(spec.decode_attention.values) * spec.bandwidth <= device.bandwidth * 1e9


@pytest.mark.parametrize("name", names())
def test_shares_grow_with_size(name: str) -> None:
    spec = hardware(name)
    for share in SHARES:
        values = getattr(spec, share).values
        assert list(values) == sorted(values)


@pytest.mark.parametrize("name", names())
def test_links_slow_down_with_bytes(name: str) -> None:
    spec = hardware(f"16x{name}")
    for curve in (spec.send, *spec.all_reduce.values()):
        times = [curve(size) for size in SIZES]
        assert times == sorted(times)
        assert times[-1] > 15 * times[-2]  # 32 times the bytes, beyond the last measurement


@pytest.mark.parametrize("name", PCIE)
def test_pcie_slows_down_with_ranks(name: str) -> None:
    spec = hardware(f"32x{name}")
    for size in SIZES:
        times = [spec.all_reduce[n](size) for n in range(2, 33)]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))


@pytest.mark.parametrize("box", ["L40S", "RTX-PRO-6000"])
def test_a_faster_link_is_never_slower(box: str) -> None:
    specs = [hardware(f"8xL4@{link}/{box}") for link in sorted(PCIE_LINKS, key=rate)]
    for size in SIZES:
        for n in (2, 4, 8):
            times = [spec.all_reduce[n](size) for spec in specs]
            assert times == sorted(times, reverse=True)
    assert [spec.to_device for spec in specs] == sorted(spec.to_device for spec in specs)


def rate(name: str) -> float:
    return next(link.rate for link in links().links if link.name == name)


def test_half_the_lanes_halve_what_links_bound() -> None:
    wide, narrow = hardware("8xL4"), hardware("8xL4@pcie4x8")
    assert narrow.name == "L4@pcie4x8"
    assert narrow.to_device == pytest.approx(wide.to_device / 2, rel=0.01)
    assert narrow.send(1 << 30) == pytest.approx(2 * wide.send(1 << 30), rel=0.01)
    assert narrow.all_reduce[2](1 << 30) == pytest.approx(2 * wide.all_reduce[2](1 << 30), rel=0.01)
    assert narrow.all_reduce[8] == wide.all_reduce[8]  # the host bounds it
    assert narrow.all_reduce[2](512) == pytest.approx(wide.all_reduce[2](512))  # latency stays


def test_a_link_between_devices_leaves_the_way_to_the_host() -> None:
    assert hardware("8xA100-80G-PCIe@nvlink3/A100-SXM").to_device == hardware("8xA100-80G-PCIe").to_device


def test_where_a_node_was_measured_its_links_are_as_measured() -> None:
    for name, box in fits().boxes.items():
        spec = hardware(f"8x{ {'A100-SXM': 'A100-80G-SXM'}.get(name, name) }")
        for n, curve in box.all_reduce.items():
            assert spec.all_reduce[n].values == pytest.approx(curve.values)


def test_more_than_eight_ranks_are_several_hosts() -> None:
    one, two = hardware("8xL4"), hardware("16xL4")
    assert two.node_to_device == 2 * one.node_to_device
    large = 1 << 30
    assert two.all_reduce[16](large) == pytest.approx(
        one.all_reduce[8](large) * (15 / 16) / (7 / 8), rel=0.01
    )


PRODUCTS = [  # device, rows, columns, depth, microseconds
    ("L40S", 1, 10240, 8192, 226.431),
    ("L40S", 64, 10240, 8192, 267.037),
    ("L40S", 1024, 65536, 8192, 4149.897),
    ("L40S", 4096, 8192, 7168, 1782.028),
    ("A40", 1, 57344, 8192, 1833.0),
    ("A40", 64, 8192, 28672, 923.0),
    ("A40", 2048, 57344, 8192, 15890.75),
    ("A40", 4096, 14336, 8192, 8234.75),
    ("A100-80G-SXM", 1, 10240, 8192, 117.032),
    ("A100-80G-SXM", 64, 10240, 8192, 123.492),
]
"""aiconfigurator 095f58a (vLLM 0.14, bfloat16) and vidur 7d47513 (A40, float16)."""

ALL_REDUCES = [  # device, ranks, bytes, microseconds
    ("L40S", 2, 33554432, 1689.3),
    ("L40S", 4, 33554432, 9836.6),
    ("L40S", 8, 33554432, 38854.0),
    ("RTX-PRO-6000", 8, 8388608, 661.36),
    ("A100-80G-SXM", 4, 4194304, 68.76),
    ("H100-SXM", 8, 65536, 18.66),
    ("H200", 2, 67108864, 245.0),
]
"""aiconfigurator 095f58a, NCCL."""

DECODES = [  # device, sequences, keys each, KV heads of 128, microseconds
    ("L40S", 16, 8191, 8, 759.232),
    ("L40S", 128, 2047, 2, 375.84),
    ("A100-80G-SXM", 16, 8191, 8, 346.645),
    ("A100-80G-SXM", 64, 1023, 2, 71.904),
    ("H100-SXM", 128, 2047, 8, 355.264),
    ("H100-SXM", 64, 1023, 8, 103.355),
    ("H200", 128, 2047, 2, 78.949),
]
"""aiconfigurator 095f58a, vLLM 0.14, beyond the L2 cache."""

PREFILLS = [  # device, prompts, tokens each, heads of 128, microseconds
    ("L40S", 1, 8192, 64, 6244.912),
    ("L40S", 4, 2048, 32, 855.307),
    ("A100-80G-SXM", 4, 2048, 64, 1803.883),
    ("A100-80G-SXM", 1, 1024, 8, 44.203),
    ("H100-SXM", 1, 8192, 64, 1851.856),
    ("H200", 1, 8192, 32, 1016.928),
]


def product_seconds(spec: HardwareSpec, rows: int, columns: int, depth: int) -> float:
    arithmetic = 2 * rows * columns * depth / (spec.flops["bfloat16"] * spec.product(rows))
    return max(arithmetic, 2 * columns * depth / spec.bandwidth) + spec.operator_overhead


def test_products_are_as_measured() -> None:
    ratios = [product_seconds(hardware(d), m, n, k) * 1e6 / t for d, m, n, k, t in PRODUCTS]
    assert median(abs(ratio - 1) for ratio in ratios) < 0.10
    assert all(0.75 < ratio < 1.25 for ratio in ratios)


def test_all_reduces_are_as_measured() -> None:
    for device, n, size, microseconds in ALL_REDUCES:
        assert hardware(f"{n}x{device}").all_reduce[n](size) * 1e6 == pytest.approx(microseconds, rel=0.16)


def test_attention_is_as_measured() -> None:
    for device, batch, keys, heads, microseconds in DECODES:
        seconds = decode_seconds(hardware(device), 4 * batch * keys * heads * 128)
        assert seconds * 1e6 == pytest.approx(microseconds, rel=0.11)
    for device, batch, tokens, heads, microseconds in PREFILLS:
        seconds = prefill_seconds(hardware(device), 2 * batch * tokens**2 * heads * 128)
        assert seconds * 1e6 == pytest.approx(microseconds, rel=0.15)


def decode_seconds(spec: HardwareSpec, moved: float) -> float:
    return moved / (spec.bandwidth * spec.decode_attention(moved)) + spec.operator_overhead


def prefill_seconds(spec: HardwareSpec, flops: float) -> float:
    peak = spec.flops["bfloat16"] * spec.prefill_attention(flops)
    return flops / peak + spec.operator_overhead


def test_a_smaller_device_is_full_with_less_work() -> None:
    large, small = hardware("H100-SXM"), hardware("H100-PCIe")
    slower = small.bandwidth / large.bandwidth
    for moved in (1e5, 1e7, 1e8):
        assert small.decode_attention(moved) > large.decode_attention(moved)
        assert decode_seconds(small, slower * moved) == pytest.approx(decode_seconds(large, moved))
    fewer = small.flops["float32"] / large.flops["float32"]
    for flops in (1e8, 1e9, 1e10):
        assert small.prefill_attention(flops) > large.prefill_attention(flops)
        assert prefill_seconds(small, fewer * flops) == pytest.approx(prefill_seconds(large, flops), rel=0.02)


@pytest.mark.parametrize("name", ["L40S", "A100-80G-SXM", "H100-SXM", "H200"])
def test_attention_of_measured_devices_is_as_fitted(name: str) -> None:
    spec, fit = hardware(name), fits().attention[devices()[name].attention]
    for found, fitted in ((spec.decode_attention, fit.decode), (spec.prefill_attention, fit.prefill)):
        assert found.sizes == pytest.approx(fitted.sizes)
        assert found.values == pytest.approx(fitted.values, rel=0.001)


def test_power_limits_cap_large_products_only() -> None:
    fitted, small = hardware("L40S"), hardware("L4")
    assert large_products("L4") == pytest.approx(57e12)
    assert large_products("RTX-4090") == pytest.approx(159e12)
    assert small.product(512) <= fitted.product(512)
    fewer = small.flops["float32"] / fitted.flops["float32"]
    assert small.prefill_attention(fewer * 1e10) == pytest.approx(fitted.prefill_attention(1e10), rel=0.05)


def test_a_curve_needs_positive_rising_sizes() -> None:
    with pytest.raises(ConfigError, match="rise"):
        Curve((1.0, 1.0), (1.0, 2.0))


def test_the_page_lists_every_device() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text()
    assert [name for name in names() if f"| `{name}` |" not in page] == []
