"""Fits the curves of the hardware catalogue to published measurements of operators, and says how well they fit.

    python benchmarks/fit_catalogue.py CALIBRATION            # writes curves.json and the tables of docs/hardware.md
    python benchmarks/fit_catalogue.py CALIBRATION --dry-run  # prints the errors only

CALIBRATION is a folder with `ops.csv` (gpu, op, shape, dtype, tp, time_us, source, note), `nccl.csv` (system,
op_name, num_gpus, bytes, time_us) and `tdpipe_L20_prefill_*.csv` (total tokens, milliseconds). The form is the
planner's: a product of M rows takes `max(flops / (peak * share(M)), weight bytes / bandwidth) + overhead`, causal
attention `flops / (peak * share(flops)) + overhead` with half of the square of scores counted, decode attention
`KV bytes / (bandwidth * share(KV bytes)) + overhead`. Everything is fitted by medians and made monotone.

Errors are of fits to the even rows, judged on the odd ones; what is written is fitted to all rows.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from catalogue_fits import (
    AIC,
    ATTENTION,
    BOXES,
    DECODE_SIZES,
    GPUS,
    PREFILL_SIZES,
    VIDUR,
    Collectives,
    Gpu,
    Operators,
    ProductFit,
    Row,
    Size,
    decode_bytes,
    fit_decode,
    fit_overhead,
    fit_prefill,
    fit_products,
    fit_times,
    miss,
    prefill_flops,
    read_collectives,
    read_operators,
    sends,
)
from msgspec.structs import replace

from seesaw.core.hardware import Curve, HardwareSpec

if TYPE_CHECKING:
    from seesaw.planning.catalogue.data import Device

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "src/seesaw/planning/catalogue/curves.json"
PAGE = ROOT / "docs/hardware.md"
STEP_PARTS = ("cpu-prepare_inputs_e2e", "cpu-sampler_e2e")
"""What of a step's work on the host the devices wait for; scheduling and output handling overlap the next step."""

Errors = dict[str, list[float]]
"""Relative errors by what is judged and on which device."""


# ---- judging -------------------------------------------------------------------------------------------------


def misses(rows: Sequence[Row], predicted: Callable[[Row], float]) -> list[float]:
    """Of all rows."""
    return [miss(predicted(row), row["seconds"]) for row in rows]


def judge_operators(operators: Operators) -> Errors:
    """Fits to even rows on odd ones."""
    errors: Errors = {}
    overhead = fit_overhead(operators, every=2)
    for name, gpu in GPUS.items():
        rows = operators[gpu.rows, "gemm", "16"]
        fit = fit_products(operators, name, overhead, every=2)
        few, many = ([row for row in rows[1::2] if (row["m"] > 128) == large] for large in (False, True))
        seconds = partial(fit.seconds, peak=gpu.peak)
        errors[f"products, M ≤ 128 | {name}"] = misses(few, seconds)
        errors[f"products, M ≥ 256 | {name}"] = misses(many, seconds)
        if name in ATTENTION:
            errors |= judge_attention(name, gpu, fit, operators)
    return errors


def judge_attention(name: str, gpu: Gpu, fit: ProductFit, operators: Operators) -> Errors:
    """The same for attention."""
    prefill, decode = (operators[gpu.rows, f"attention-{phase}", "16"] for phase in ("prefill", "decode"))
    prefilled = prefill_seconds_of(prefill[::2], gpu, fit)
    decoded = decode_seconds_of(decode[::2], gpu, fit)
    cached, uncached = (
        [r for r in decode[1::2] if (decode_bytes(r) < gpu.cache) == hit] for hit in (True, False)
    )
    return {
        f"prefill attention, ≥ 512 tokens | {name}": misses(prompts(prefill[1::2]), prefilled),
        f"decode attention, KV beyond the L2 cache | {name}": misses(uncached, decoded),
        f"decode attention, KV within it | {name}": misses(cached, decoded),
    }


def prompts(rows: Sequence[Row]) -> list[Row]:
    """Those long enough for attention to matter."""
    return [row for row in rows if row["seq"] >= 512]


def prefill_seconds_of(
    rows: Sequence[Row], gpu: Gpu, fit: ProductFit, size: Size = prefill_flops
) -> Callable[[Row], float]:
    """What a curve by `size`, fitted to `rows`, predicts of a row."""
    share = fit_prefill(rows, gpu.peak, fit.overhead, size)
    return lambda row: prefill_flops(row) / gpu.peak / share(size(row)) + fit.overhead


def decode_seconds_of(
    rows: Sequence[Row], gpu: Gpu, fit: ProductFit, size: Size = decode_bytes
) -> Callable[[Row], float]:
    """The same of decode attention."""
    share = fit_decode(rows, fit, gpu.cache, size)
    return lambda row: decode_bytes(row) / fit.bandwidth / share(size(row)) + fit.overhead


def judge_sizes(operators: Operators) -> Errors:
    """Attention by what its share may go by, where it matters: fits to even rows on odd ones."""
    errors: Errors = {}
    overhead = fit_overhead(operators, every=2)
    for name in ATTENTION:
        gpu, fit = GPUS[name], fit_products(operators, name, overhead, every=2)
        prefill, decode = (operators[gpu.rows, f"attention-{phase}", "16"] for phase in ("prefill", "decode"))
        long = prompts(prefill[1::2])
        uncached = [row for row in decode[1::2] if decode_bytes(row) >= gpu.cache]
        for what, size in PREFILL_SIZES.items():
            predicted = prefill_seconds_of(prefill[::2], gpu, fit, size)
            errors[f"prefill, {what} | {name}"] = misses(long, predicted)
        for what, size in DECODE_SIZES.items():
            predicted = decode_seconds_of(decode[::2], gpu, fit, size)
            errors[f"decode, {what} | {name}"] = misses(uncached, predicted)
    return errors


def judge_links(operators: Operators, collectives: Collectives) -> Errors:
    """All-reduce and send: every second size against lines through the others."""
    errors: Errors = {}
    for name, (system, _, _, sender) in BOXES.items():
        for n in (2, 4, 8):
            points = collectives[system, "all_reduce", n]
            curve = fit_times(points[::2], 1)
            errors[f"all-reduce of {n} | {name}"] = [miss(curve(size), t) for size, t in points[1::2]]
        points = sends(operators, sender) if sender else collectives[system, "alltoall", 2]
        curve = fit_times(points[::2], 1)
        errors[f"send | {name}"] = [miss(curve(size), t) for size, t in points[1::2]]
    return errors


def judge_elsewhere(operators: Operators, collectives: Collectives) -> Errors:
    """Fits to all rows of one source, against another source or another type."""
    errors: Errors = {}
    overhead = fit_overhead(operators)
    fits = {name: fit_products(operators, name, overhead) for name in GPUS}
    for name, other in (("A100-SXM", "A100-80GB"), ("H100-SXM", "H100-80GB")):
        seconds = partial(fits[name].seconds, peak=GPUS[name].peak)
        errors[f"products, vidur's {other} | {name}"] = misses(operators[other, "gemm", "16"], seconds)
    errors |= judge_other_attention(operators, fits["A100-SXM"])
    for name in ("L40S", "H100-SXM"):
        seconds = partial(fits[name].seconds, peak=2 * GPUS[name].peak, element=1)
        rows = operators[GPUS[name].rows, "gemm", "fp8"]
        errors[f"products in fp8, at twice the peak and half the bytes | {name}"] = misses(rows, seconds)
    for name, (system, *_) in BOXES.items():
        tables = {n: fit_times(collectives[system, "all_reduce", n], 2) for n in (2, 4, 8)}
        rows = operators[GPUS[name].rows if name in GPUS else name, "allreduce-vllm-graph", "16"]
        errors[f"all-reduce from 1 MiB, vLLM's dispatcher | {name}"] = [
            miss(tables[int(row["gpus"])](row["bytes"]), row["seconds"])
            for row in rows
            if row["bytes"] >= 1 << 20
        ]
    return errors


def judge_other_attention(operators: Operators, fit: ProductFit) -> Errors:
    """Attention of A100, fitted to all rows, against vidur's."""
    gpu, other = GPUS["A100-SXM"], "A100-80GB"
    own, others = (
        {phase: operators[rows, f"attention-{phase}", "16"] for phase in ("prefill", "decode")}
        for rows in (gpu.rows, other)
    )
    uncached = [row for row in others["decode"] if decode_bytes(row) >= gpu.cache]
    return {
        f"prefill attention, ≥ 512 tokens, vidur's {other} | A100-SXM": misses(
            prompts(others["prefill"]), prefill_seconds_of(own["prefill"], gpu, fit)
        ),
        f"decode attention, KV beyond the L2 cache, vidur's {other} | A100-SXM": misses(
            uncached, decode_seconds_of(own["decode"], gpu, fit)
        ),
    }


def judge_whole_models(folder: Path, specs: dict[str, HardwareSpec]) -> Errors:
    """Prefill of whole models on L20, which no curve was fitted to, by the catalogue's L20."""
    shapes = {"Llama-13B": (40, 5120, 13824, 40, 40), "Qwen2.5-32B": (64, 5120, 27648, 40, 8)}
    errors: Errors = {}
    for model, shape in shapes.items():
        with (folder / f"tdpipe_L20_prefill_{model}.csv").open() as file:
            points = [(int(tokens), float(ms) * 1e-3) for tokens, ms in list(csv.reader(file))[1:]]
        for label, low, high in (("to 128", 1, 128), ("beyond 128", 129, 1 << 20)):
            errors[f"prefill of {model}, {label} tokens | L20"] = [
                miss(prefill_seconds(specs["L20"], shape, tokens), seconds)
                for tokens, seconds in points[:: max(1, len(points) // 256)]
                if low <= tokens <= high
            ]
    return errors


def judge_stand_ins(operators: Operators) -> Errors:
    """Attention of measured devices, composed as if only another one had been measured."""
    from seesaw.planning.catalogue.compose import compose, link_named
    from seesaw.planning.catalogue.data import devices

    errors: Errors = {}
    for name, entry, measured in (
        ("A100-SXM", "A100-80G-SXM", "H100-SXM"),
        ("H100-SXM", "H100-SXM", "H200"),
        ("H200", "H200", "H100-SXM"),
    ):
        device = replace(devices()[entry], attention=measured)
        spec = compose(device, 1, link_named(device.link), link_named(device.host_link), device.box)
        prefill, decode = (
            operators[GPUS[name].rows, f"attention-{phase}", "16"] for phase in ("prefill", "decode")
        )
        uncached = [row for row in decode if decode_bytes(row) >= GPUS[name].cache]
        errors[f"prefill attention, ≥ 512 tokens, by {measured}'s curve | {name}"] = misses(
            prompts(prefill), partial(composed_prefill, spec)
        )
        errors[f"decode attention, KV beyond the L2 cache, by {measured}'s curve | {name}"] = misses(
            uncached, partial(composed_decode, spec)
        )
    return errors


def composed_prefill(spec: HardwareSpec, row: Row) -> float:
    """Prefill attention in the planner's form."""
    flops = prefill_flops(row)
    return flops / (spec.flops["bfloat16"] * spec.prefill_attention(flops)) + spec.operator_overhead


def composed_decode(spec: HardwareSpec, row: Row) -> float:
    """Decode attention in the planner's form."""
    moved = decode_bytes(row)
    return moved / (spec.bandwidth * spec.decode_attention(moved)) + spec.operator_overhead


def prefill_seconds(spec: HardwareSpec, shape: tuple[int, ...], tokens: int) -> float:
    """One prompt through all layers: four products, attention and five small operators each."""
    layers, hidden, ffn, heads, kv_heads = shape
    width = hidden // heads * (heads + 2 * kv_heads)
    fit = ProductFit(spec.bandwidth, spec.operator_overhead, spec.product)
    products = ((width, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn))
    peak = spec.flops["bfloat16"]
    seconds = sum(fit.seconds({"m": tokens, "n": n, "k": k}, peak) for n, k in products)
    flops = 2 * tokens**2 * hidden
    seconds += flops / (peak * spec.prefill_attention(flops)) + 6 * spec.operator_overhead
    seconds += 2 * tokens * (8 * hidden + 3 * width + 3 * ffn) / spec.bandwidth
    return layers * seconds + spec.step_overhead


# ---- writing -------------------------------------------------------------------------------------------------


def as_json(curve: Curve) -> dict[str, Any]:
    """As msgspec reads it."""
    return {"sizes": curve.sizes, "values": curve.values, "extends": curve.extends}


def fit_box(name: str, collectives: Collectives, operators: Operators) -> dict[str, Any]:
    """A measured node's entry of `curves.json`."""
    system, link, slows, sender = BOXES[name]
    tables = {n: fit_times(collectives[system, "all_reduce", n], 2) for n in (2, 4, 8)}
    if slows:
        for n in (4, 8):
            floor = tables[n // 2].values
            values = tuple(max(pair) for pair in zip(tables[n].values, floor, strict=True))
            tables[n] = Curve(tables[n].sizes, values, True)
    if sender is None:
        points = [(size / 2, seconds) for size, seconds in collectives[system, "alltoall", 2]]
        source = f"half of an all-to-all between two ranks, which NCCL does by send and receive ({AIC})"
    else:
        points = sends(operators, sender)
        source = f"{VIDUR}, send and receive within a node of {sender}"
    return {
        "link": link,
        "all_reduce": {str(n): as_json(curve) for n, curve in tables.items()},
        "send": as_json(fit_times(points, 1 if sender else 2)),
        "source": f"{AIC}, NCCL all-reduce, {system}",
        "send_source": source,
    }


def curves(operators: Operators, collectives: Collectives) -> dict[str, Any]:
    """All of `curves.json`, fitted to all rows."""
    steps = [
        row["seconds"]
        for part in STEP_PARTS
        for row in operators["A100-80GB", part, "-"]
        if row["batch"] == 32
    ]
    overhead = fit_overhead(operators)
    products: dict[str, dict[str, Any]] = {}
    attention: dict[str, dict[str, Any]] = {}
    for name, gpu in GPUS.items():
        fit = fit_products(operators, name, overhead)
        products[name] = {
            "bandwidth_share": round(fit.bandwidth / gpu.bandwidth, 3),
            "operator_overhead": fit.overhead,
            "share": as_json(fit.share),
            "source": gpu.source,
        }
        if name in ATTENTION:
            prefill, decode = (
                operators[gpu.rows, f"attention-{phase}", "16"] for phase in ("prefill", "decode")
            )
            attention[name] = {
                "peak_ratio": round(gpu.peak / gpu.float32, 3),
                "float32": gpu.float32 / 1e12,
                "bandwidth": round(gpu.bandwidth / 1e9 * products[name]["bandwidth_share"], 3),
                "prefill": as_json(fit_prefill(prefill, gpu.peak, fit.overhead)),
                "decode": as_json(fit_decode(decode, fit, gpu.cache)),
                "source": gpu.source,
            }
    return {
        "step_overhead": round(sum(steps), 5),
        "step_overhead_source": "assumed: preparing inputs and sampling, as vidur measured them for an engine like "
        "vLLM at 32 sequences; scheduling and output handling overlap the next step",
        "products": products,
        "attention": attention,
        "boxes": {name: fit_box(name, collectives, operators) for name in BOXES},
    }


def error_table(errors: Errors) -> str:
    """As Markdown."""
    lines = ["| what | device | rows | median | 90th percentile |", "|---|---|---|---|---|"]
    for key, values in errors.items():
        what, device = key.split(" | ")
        ordered = sorted(values)
        high = ordered[int(0.9 * (len(ordered) - 1))]
        lines.append(f"| {what} | {device} | {len(values)} | {median(ordered):.0%} | {high:.0%} |")
    return "\n".join(lines)


def size_table(errors: Errors) -> str:
    """Medians by size and device, as Markdown."""
    lines = [f"| share goes by | {' | '.join(ATTENTION)} |", "|---" * (1 + len(ATTENTION)) + "|"]
    for what in dict.fromkeys(key.split(" | ")[0] for key in errors):
        medians = (f"{median(errors[f'{what} | {name}']):.0%}" for name in ATTENTION)
        lines.append(f"| {what} | {' | '.join(medians)} |")
    return "\n".join(lines)


def device_table(specs: dict[str, HardwareSpec], devices: dict[str, Device]) -> str:
    """The catalogue as Markdown."""
    lines = [
        "| device | memory | bf16 / fp8 / int8 / fp32 peak | large products | published → streamed "
        "| link, measured node | source of peaks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, device in devices.items():
        spec, tops = specs[name], device.tflops
        peaks = " / ".join(
            f"{tops[t]:g}" if t in tops else "–" for t in ("bfloat16", "fp8", "int8", "float32")
        )
        reached = spec.product(8192) * tops["bfloat16"]
        lines.append(
            f"| `{name}` | {device.memory_mib / 1024:.1f} GiB | {peaks} | {reached:.0f} | "
            f"{device.bandwidth:g} → {spec.bandwidth / 1e9:.0f} | {device.link}, {device.box} "
            f"| {device.sources['flops']} |"
        )
    return "\n".join(lines)


def link_table(specs: dict[str, HardwareSpec]) -> str:
    """Rates of an all-reduce of 32 MiB, as Markdown."""
    size = 32 << 20
    lines = [
        "| node | 2 ranks | 4 | 8 | 64 KiB among 2 / 4 / 8 | send of 32 MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, spec in specs.items():
        rates = " | ".join(f"{size / spec.all_reduce[n](size) / 1e9:.2f}" for n in (2, 4, 8))
        small = " / ".join(f"{spec.all_reduce[n](65536) * 1e6:.0f}" for n in (2, 4, 8))
        lines.append(f"| `8x{name}` | {rates} | {small} µs | {size / spec.send(size) / 1e9:.1f} |")
    return "\n".join(lines)


def put(name: str, table: str) -> None:
    """A table between its marks in the page."""
    page = PAGE.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = page.split(start)
    PAGE.write_text(before + start + table + "\n" + rest[rest.index(end) :])


def main() -> None:
    """Fit, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the errors and write nothing")
    args = parser.parse_args()
    operators, collectives = read_operators(args.calibration), read_collectives(args.calibration)
    held_out = error_table(judge_operators(operators) | judge_links(operators, collectives))
    sizes = size_table(judge_sizes(operators))
    if args.dry_run:
        print(held_out, sizes, error_table(judge_elsewhere(operators, collectives)), sep="\n\n")
        return
    CURVES.write_text(json.dumps(curves(operators, collectives), indent=1) + "\n")
    from seesaw.planning.catalogue import hardware, names  # reads what has just been written
    from seesaw.planning.catalogue.data import devices

    specs = {name: hardware(f"8x{name}") for name in names()}
    elsewhere = judge_elsewhere(operators, collectives) | judge_stand_ins(operators)
    elsewhere |= judge_whole_models(args.calibration, specs)
    nodes = (
        "L4",
        "L4@pcie4x8",
        "L4@pcie4x8/RTX-PRO-6000",
        "A100-80G-PCIe",
        "RTX-PRO-6000",
        "A100-80G-SXM",
        "H100-SXM",
        "H200",
    )
    tables = {
        "devices": device_table(specs, devices()),
        "links": link_table({name: hardware(f"8x{name}") for name in nodes}),
        "held-out": held_out,
        "sizes": sizes,
        "elsewhere": error_table(elsewhere),
    }
    for name, table in tables.items():
        print(table, end="\n\n")
        put(name, table)


if __name__ == "__main__":
    main()
