"""How the curves of the hardware catalogue follow from measurements of operators: see `fit_catalogue.py`."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import median

from seesaw.core.hardware import Curve


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device with measurements; `peak` and `bandwidth` are the published ones."""

    rows: str
    """Its name in `ops.csv`."""
    peak: float
    float32: float
    bandwidth: float
    cache: float
    """Bytes of its L2 cache."""
    source: str


AIC, VIDUR = "aiconfigurator 095f58a", "vidur 7d47513"
GPUS = {
    "A40": Gpu("A40-48GB", 149.7e12, 37.4e12, 696e9, 6e6, f"{VIDUR}, A40"),
    "L40S": Gpu("L40S", 362.05e12, 91.6e12, 864e9, 96e6, f"{AIC}, L40S, vLLM 0.14"),
    "A100-PCIe": Gpu(
        "A100-80GB",
        312e12,
        19.5e12,
        1935e9,
        40e6,
        f"{VIDUR}, A100 80 GB (the source does not name the board; its rates are those of the 300 W card)",
    ),
    "A100-SXM": Gpu("A100-SXM-80GB", 312e12, 19.5e12, 2039e9, 40e6, f"{AIC}, A100 SXM, vLLM 0.14"),
    "H100-SXM": Gpu("H100-SXM-80GB", 989.4e12, 67e12, 3350e9, 50e6, f"{AIC}, H100 SXM, vLLM 0.14 and 0.19"),
    "H200": Gpu("H200-SXM-141GB", 989.4e12, 67e12, 4800e9, 50e6, f"{AIC}, H200 SXM, vLLM 0.14 and 0.19"),
}
SAME_MEMORY = (("A100-PCIe", "A100-SXM"),)
"""Boards with the same memory and processor, whose share of the bandwidth the two sources put 10 % apart: pooled."""
ATTENTION = ("L40S", "A100-SXM", "H100-SXM", "H200")
BOXES = {  # name: (system in nccl.csv, link, whether ranks only ever slow it down, GPU of its send/recv rows)
    "L40S": ("l40s", "pcie4x16", True, None),
    "RTX-PRO-6000": ("rtx_pro_6000_server", "pcie5x16", True, None),
    "A100-SXM": ("a100_sxm", "nvlink3", False, "A100-SXM-80GB"),
    "H100-SXM": ("h100_sxm", "nvlink4", False, "H100-SXM-80GB"),
    "H200": ("h200_sxm", "nvlink4", False, "H100-SXM-80GB"),
}
Row = dict[str, float]
"""The numbers of a row's shape, and `seconds`."""
Size = Callable[[Row], float]
Operators = dict[tuple[str, str, str], list[Row]]
"""By (gpu, op, dtype)."""
Collectives = dict[tuple[str, str, int], list[tuple[float, float]]]
"""(bytes, seconds) by (system, operation, ranks)."""


# ---- reading -------------------------------------------------------------------------------------------------


def read_operators(folder: Path) -> Operators:
    """Rows of `ops.csv` by (gpu, op, dtype), in the file's order. 16-bit types count as one."""
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    with (folder / "ops.csv").open() as file:
        for record in csv.DictReader(file):
            dtype = "16" if record["dtype"] in ("float16", "bfloat16") else record["dtype"]
            row = {key: float(value) for key, value in re.findall(r"(\w+)=(\d+)", record["shape"])}
            row["seconds"] = float(record["time_us"]) * 1e-6
            found[record["gpu"], record["op"], dtype].append(row)
    return found


def read_collectives(folder: Path) -> Collectives:
    """(bytes, seconds) of `nccl.csv` by (system, operation, ranks), by size."""
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    with (folder / "nccl.csv").open() as file:
        for record in csv.DictReader(file):
            key = record["system"], record["op_name"], int(record["num_gpus"])
            found[key].append((float(record["bytes"]), float(record["time_us"]) * 1e-6))
    return {key: sorted(points) for key, points in found.items()}


# ---- monotone medians ----------------------------------------------------------------------------------------


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest non-decreasing values, by weighted squares of logarithms (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((log(value), weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [exp(value) for value, _, count in pools for _ in range(count)]


def median_curve(samples: dict[float, list[float]], *, extends: bool = False) -> Curve:
    """A rising curve through the medians by size."""
    sizes = sorted(samples)
    values = rising([median(samples[size]) for size in sizes], [len(samples[size]) for size in sizes])
    return rounded(Curve(tuple(sizes), tuple(values), extends))


def rounded(curve: Curve) -> Curve:
    """Four digits are more than any of this is worth."""
    values = tuple(float(f"{value:.4g}") for value in curve.values)
    return Curve(curve.sizes, values, curve.extends)


# ---- products ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProductFit:
    """Of one device; `bandwidth` in bytes per second."""

    bandwidth: float
    overhead: float
    share: Curve

    def seconds(self, row: Row, peak: float, element: int = 2) -> float:
        """The planner's form."""
        work = row["n"] * row["k"]
        arithmetic = 2 * row["m"] * work / (peak * self.share(row["m"]))
        return max(arithmetic, element * work / self.bandwidth) + self.overhead


def streams(row: Row) -> bool:
    """Whether so few rows leave memory the only bound."""
    return row["m"] <= 32


def fit_overhead(operators: Operators, every: int = 1) -> float:
    """Seconds, one figure for all devices: it belongs to launching a kernel and not to the device.

    That with which constant bandwidths explain the products of few rows best, on average over the devices.
    """

    def mean_miss(overhead: float) -> float:
        misses = []
        for gpu in GPUS.values():
            rows = [row for row in operators[gpu.rows, "gemm", "16"][::every] if streams(row)]
            bandwidth = median(2 * row["n"] * row["k"] / (row["seconds"] - overhead) for row in rows)
            predicted = (2 * row["n"] * row["k"] / bandwidth + overhead for row in rows)
            misses += [miss(p, row["seconds"]) for p, row in zip(predicted, rows, strict=True)]
        return sum(misses) / len(misses)

    return min((half * 0.5e-6 for half in range(2, 13)), key=mean_miss)


def streamed_share(operators: Operators, name: str, overhead: float, every: int) -> float:
    """Of the published bandwidth, in products of few rows."""
    group = next((group for group in SAME_MEMORY if name in group), (name,))
    return median(
        2 * row["n"] * row["k"] / (row["seconds"] - overhead) / GPUS[member].bandwidth
        for member in group
        for row in operators[GPUS[member].rows, "gemm", "16"][::every]
        if streams(row)
    )


def fit_products(operators: Operators, name: str, overhead: float, every: int = 1) -> ProductFit:
    """Bandwidth from products of few rows, shares from those that take clearly longer than their weights do.

    Below the first such number of rows the share is unknown and taken to be the same: memory bounds there.
    """
    gpu = GPUS[name]
    bandwidth = gpu.bandwidth * streamed_share(operators, name, overhead, every)
    shares: dict[float, list[float]] = defaultdict(list)
    over_streaming: dict[float, list[float]] = defaultdict(list)
    for row in operators[gpu.rows, "gemm", "16"][::every]:
        work, net = row["n"] * row["k"], row["seconds"] - overhead
        shares[row["m"]].append(2 * row["m"] * work / gpu.peak / net)
        over_streaming[row["m"]].append(net * bandwidth / (2 * work))
    bound = {m: values for m, values in shares.items() if median(over_streaming[m]) > 1.3}
    return ProductFit(bandwidth, overhead, median_curve(bound))


# ---- attention -----------------------------------------------------------------------------------------------


def prefill_flops(row: Row) -> float:
    """Of causal attention: half of the square."""
    return 2 * row["batch"] * row["seq"] ** 2 * row["q_heads"] * row["head_dim"]


def decode_bytes(row: Row) -> float:
    """Of 16-bit keys and values."""
    return 4 * row["batch"] * row["ctx"] * row["kv_heads"] * row["head_dim"]


PREFILL_SIZES: dict[str, Size] = {
    "flops of the batch": prefill_flops,
    "flops of one sequence": lambda row: prefill_flops(row) / row["batch"],
    "tokens of one sequence": lambda row: row["seq"],
}
"""What the share may go by: the catalogue takes the first, the others are for comparison."""
DECODE_SIZES: dict[str, Size] = {
    "bytes read": decode_bytes,
    "tokens read": lambda row: row["batch"] * row["ctx"],
}


def binned(size: float) -> float:
    """The nearest power of two: contexts are one less than one."""
    return float(2 ** round(log(size, 2)))


def fit_prefill(rows: Sequence[Row], peak: float, overhead: float, size: Size = prefill_flops) -> Curve:
    """Share of the peak by `size`."""
    samples: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        samples[binned(size(row))].append(prefill_flops(row) / peak / (row["seconds"] - overhead))
    return median_curve(samples)


def fit_decode(rows: Sequence[Row], fit: ProductFit, cache: float, size: Size = decode_bytes) -> Curve:
    """Share of the products' bandwidth by `size`.

    Measurements repeat, so what fits the L2 cache is read from there. In a model it is not: such rows count for no
    more than what is read from memory.
    """

    def share(row: Row) -> float:
        return decode_bytes(row) / fit.bandwidth / (row["seconds"] - fit.overhead)

    ceiling = median(share(row) for row in rows if decode_bytes(row) > 2 * cache)
    samples: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        cached = decode_bytes(row) < cache
        samples[binned(size(row))].append(min(share(row), ceiling) if cached else share(row))
    return median_curve(samples)


# ---- links ---------------------------------------------------------------------------------------------------


def fit_times(points: Sequence[tuple[float, float]], every: int) -> Curve:
    """Seconds by bytes, rising, at each `every`-th point and the last."""
    values = rising([seconds for _, seconds in points], [1.0] * len(points))
    kept = sorted({*range(0, len(points), every), len(points) - 1})
    return rounded(Curve(tuple(points[i][0] for i in kept), tuple(values[i] for i in kept), True))


def sends(operators: Operators, gpu: str) -> list[tuple[float, float]]:
    """(bytes, seconds) of vidur's send and receive within a node."""
    rows = operators[gpu, "sendrecv-vidur", "16"]
    return sorted((row["bytes"], row["seconds"]) for row in rows if row["devices_per_node"] == 2)


def miss(predicted: float, measured: float) -> float:
    """Relative error."""
    return abs(predicted / measured - 1)
