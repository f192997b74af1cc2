"""From a device, a number of ranks and a link to a `HardwareSpec`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import ceil, exp, log

import msgspec

from seesaw.core.hardware import Curve, HardwareSpec
from seesaw.planning.catalogue.data import Box, Device, Link, Products, fits, links

NODE_RANKS = 8
"""Up to so many ranks share the memory of one host; more are taken for several hosts with the same links."""


def compose(device: Device, ranks: int, link: Link, host_link: Link, box_name: str) -> HardwareSpec:
    """`ranks` of `device`, joined by `link`, which behaves as in the measured node `box_name`."""
    products, attention, box = (
        fits().products[device.products],
        fits().attention[device.attention],
        fits().boxes[box_name],
    )
    peak = device.tflops["bfloat16"] * 1e12
    sustained = device.sustained * 1e12 / peak if device.sustained else None
    bandwidth = device.bandwidth * 1e9 * products.bandwidth_share
    to_device, node = _host_rates(host_link, ranks)
    own_link = link.name == device.link and box_name == device.box
    return HardwareSpec(
        name=device.name if own_link else f"{device.name}@{link.name}",
        ranks=ranks,
        device="cuda",
        memory=device.memory_mib << 20,
        flops={dtype: tflops * 1e12 for dtype, tflops in device.tflops.items()},
        bandwidth=bandwidth,
        product=_product_shares(products.share, sustained),
        prefill_attention=_attention_shares(
            _resized(attention.prefill, device.tflops["float32"] / attention.float32),
            device.tflops["bfloat16"] / device.tflops["float32"] / attention.peak_ratio,
            sustained,
        ),
        decode_attention=_resized(attention.decode, bandwidth / (attention.bandwidth * 1e9)),
        operator_overhead=products.operator_overhead,
        step_overhead=fits().step_overhead,
        all_reduce={n: _all_reduce(box, n, _slowness(box, link)) for n in range(2, ranks + 1)},
        send=_slowed(box.send, _slowness(box, link)),
        to_device=to_device,
        to_host=to_device,
        node_to_device=node,
        node_to_host=node,
        device_copy=bandwidth / 2,
        sources=_sources(device, link, host_link, products, box),
    )


def _product_shares(share: Curve, sustained: float | None) -> Curve:
    """`share`, brought to the level that large products are known to hold on this device.

    A device that holds more than the fitted one does so at every number of rows; one that holds less is held
    back by its power limit, which short products do not reach.
    """
    if sustained is None:
        return share
    gain = max(1.0, sustained / share.values[-1])
    return _mapped(share, lambda value: min(value * gain, sustained))


def _attention_shares(share: Curve, ratio: float, sustained: float | None) -> Curve:
    """`share`, for a device whose tensor cores are `ratio` times as fast beside its other units.

    What attention does beside its products, such as the softmax, takes as long as before, while the products
    take 1 / `ratio` of the time. No share exceeds what plain products sustain.
    """
    return _mapped(share, lambda value: min(1 / (1 + (1 / value - 1) * ratio), sustained or 1.0))


def _resized(share: Curve, scale: float) -> Curve:
    """`share`, for a device `scale` times as large or as fast: it takes as much more work to fill it.

    So what keeps small sizes from the full rate, such as latency, takes as long as on the fitted device.
    """
    return msgspec.structs.replace(share, sizes=tuple(size * scale for size in share.sizes))


def _slowness(box: Box, link: Link) -> float:
    """How many times slower `link` is than the one measured."""
    return link_named(box.link).rate / link.rate


def _slowed(seconds: Curve, slowness: float) -> Curve:
    """Latency stays, the time of the bytes grows with `slowness`."""
    latency = seconds.values[0]
    return _mapped(seconds, lambda value: latency + (value - latency) * slowness)


def _all_reduce(box: Box, ranks: int, slowness: float) -> Curve:
    """Seconds by bytes in a group of `ranks`.

    NVLink and pairs are bound by their links. On PCIe a larger group is bound by what lies between the devices,
    mostly the host: it takes what it took where it was measured, or what links that are slower than those allow. A
    ring passes 2(n-1)/n of the tensor over each link, against once the tensor with two ranks.
    """
    measured = _measured(box, ranks)
    if ranks == 2 or link_named(box.link).host_memory is None:
        return _slowed(measured, slowness)
    pair, passes = box.all_reduce[2], 2 * (ranks - 1) / ranks
    latency, pair_latency = measured.values[0], pair.values[0]

    def seconds(of_group: float, of_pair: float) -> float:
        bytes_time = of_group - latency
        over_links = min(bytes_time, passes * (of_pair - pair_latency))
        return latency + max(bytes_time, over_links * slowness)

    values = (seconds(*times) for times in zip(measured.values, pair.values, strict=True))
    return msgspec.structs.replace(measured, values=tuple(values))


def _measured(box: Box, ranks: int) -> Curve:
    """As measured for so many ranks, between the neighbouring numbers that were, or as rings beyond the last one."""
    if ranks in box.all_reduce:
        return box.all_reduce[ranks]
    last = max(box.all_reduce)
    if ranks > last:
        return _ring_beyond(box.all_reduce[last], last, ranks)
    below, above = next(pair for pair in pairwise(sorted(box.all_reduce)) if pair[0] < ranks < pair[1])
    weight = log(ranks / below) / log(above / below)
    values = (
        exp((1 - weight) * log(a) + weight * log(b))
        for a, b in zip(box.all_reduce[below].values, box.all_reduce[above].values, strict=True)
    )
    return msgspec.structs.replace(box.all_reduce[below], values=tuple(values))


def _ring_beyond(seconds: Curve, last: int, ranks: int) -> Curve:
    """A longer ring over the same links: latency grows with its steps, the bytes over each link with (n-1)/n."""
    latency = seconds.values[0]
    traffic = (ranks - 1) / ranks / ((last - 1) / last)
    return _mapped(seconds, lambda value: latency * ranks / last + (value - latency) * traffic)


def _host_rates(host_link: Link, ranks: int) -> tuple[float, float]:
    """Bytes per second between host memory and one rank, and all ranks."""
    assert host_link.host_memory is not None, f"{host_link.name} does not lead to the host"
    alone = host_link.rate * 1e9 * links().copy_share
    return alone, min(alone * ranks, host_link.host_memory * 1e9 * ceil(ranks / NODE_RANKS))


def link_named(name: str) -> Link:
    """The entry of `links.toml`."""
    return next(link for link in links().links if link.name == name)


def _mapped(curve: Curve, change: Callable[[float], float]) -> Curve:
    return msgspec.structs.replace(curve, values=tuple(change(value) for value in curve.values))


def _sources(device: Device, link: Link, host_link: Link, products: Products, box: Box) -> dict[str, str]:
    """By field of `HardwareSpec`."""
    attention = fits().attention[device.attention]
    product = f"fit of {device.products}: {products.source}"
    if device.sustained is not None:
        product += f"; level of large products {device.sustained:g} TFLOP/s: {device.sources['sustained']}"
    rate = f"link {link.name} ({link.source}), measured on {box.link}"
    copies = f"{links().copy_share:.0%} of {host_link.name} ({links().copy_share_source})"
    node = f"{host_link.host_memory:g} GB/s per host ({links().host_memory_source}), or all links together"
    return {
        "memory": device.sources["memory"],
        "flops": device.sources["flops"],
        "bandwidth": f"{products.bandwidth_share:.0%} of {device.sources['bandwidth']}; {product}",
        "product": product,
        "prefill_attention": f"fit of {device.attention}: {attention.source}",
        "decode_attention": f"fit of {device.attention}: {attention.source}",
        "operator_overhead": product,
        "step_overhead": fits().step_overhead_source,
        "all_reduce": f"{box.source}; {rate}",
        "send": f"{box.send_source}; {rate}",
        "to_device": copies,
        "to_host": copies,
        "node_to_device": node,
        "node_to_host": node,
        "device_copy": "half the bandwidth, since each byte is read and written",
    }
