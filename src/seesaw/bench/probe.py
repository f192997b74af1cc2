"""Measures what the ranks' cores can do: matrix products, reading memory, copying.

`python -m seesaw.bench.probe PLACE` is one rank's worth, a process where that rank would run (a `core.node.Place` as
JSON) that answers JSON lines; `measure` starts one per rank and has all of them measure the same thing at the same
time, because cores influence each other through caches, memory and clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from seesaw.bench.floor import Rates, layer_products
from seesaw.bench.process import Guard, JsonProcess
from seesaw.core.model_spec import ModelSpec
from seesaw.core.node import Place
from seesaw.execution.heap import with_huge_pages

ROWS = 1024
"""M of the products measured."""
ARRAY_BYTES = 256 << 20
"""Size of the array that is read and of those that are copied: well beyond any cache."""
SECONDS = 0.4
"""Of one measurement: so many windows, of which the best counts."""
_WINDOWS = 3
_PATIENCE = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What one rank did alone, and each of them with all the others busy. Flops and bytes per second."""

    ranks: int
    products: dict[str, float]
    """Best rate of each implementation and type over the sizes of the model, sum over busy ranks."""
    product_alone: dict[str, float]
    """The same of one rank alone."""
    sizes: dict[str, dict[str, float]]
    """By implementation, then by `KxN`: sum over busy ranks."""
    read: float
    read_alone: float
    copy: float
    """Bytes copied, each of which is read and written; sum over busy ranks."""
    copy_alone: float

    def best_of(self, other: ProbeResult) -> ProbeResult:
        """What the cores reached at any of two times: noise only ever slows them down."""
        return ProbeResult(
            ranks=self.ranks,
            products=_most(self.products, other.products),
            product_alone=_most(self.product_alone, other.product_alone),
            sizes={
                name: _most(self.sizes.get(name, {}), other.sizes.get(name, {}))
                for name in {**self.sizes, **other.sizes}
            },
            read=max(self.read, other.read),
            read_alone=max(self.read_alone, other.read_alone),
            copy=max(self.copy, other.copy),
            copy_alone=max(self.copy_alone, other.copy_alone),
        )

    def rates(self, dtype: str) -> Rates:
        """For weights of this type: the best products that keep its accuracy."""
        fitting = {name: rate for name, rate in self.products.items() if _keeps(name, dtype)}
        return Rates(flops=max(fitting.values()), bandwidth=self.read)

    def best_product(self, dtype: str) -> str:
        """Name of the implementation behind `rates`."""
        fitting = {name: rate for name, rate in self.products.items() if _keeps(name, dtype)}
        return max(fitting, key=lambda name: fitting[name])


def _most(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _keeps(name: str, dtype: str) -> bool:
    return name.endswith((dtype, "float32"))


def measure(
    spec: ModelSpec,
    places: Sequence[Place],
    dtypes: Sequence[str],
    *,
    threads: int = 1,
    guard: Guard,
    folder: Path,
) -> ProbeResult:
    """Measure with a process of `threads` threads in each place.

    Raises `ContestantError` if a process fails.
    """
    with ExitStack() as stack:
        probes = []
        for rank, place in enumerate(places):
            where = msgspec.json.encode(place).decode()
            probe = JsonProcess(
                [sys.executable, "-m", "seesaw.bench.probe", where],
                guard=guard,
                log=folder / f"probe-{rank}.log",
                environment=with_huge_pages({**os.environ, "OMP_NUM_THREADS": str(threads)}),
            )
            stack.callback(probe.close)
            probes.append(probe)
        by_size: dict[str, dict[str, float]] = {}
        for dtype in dtypes:
            by_size |= _products(probes, spec, dtype, set(by_size))
        alone: dict[str, float] = {}
        for name, found in by_size.items():
            k, _, n = max(found, key=lambda size: found[size]).partition("x")
            ask = {"op": "product", "name": name, "rows": ROWS, "k": int(k), "n": int(n)}
            alone[name] = _rates(probes[:1], ask)[0]
        return ProbeResult(
            ranks=len(places),
            products={name: max(found.values()) for name, found in by_size.items()},
            product_alone=alone,
            sizes=by_size,
            read=sum(_rates(probes, {"op": "read"})),
            read_alone=_rates(probes[:1], {"op": "read"})[0],
            copy=sum(_rates(probes, {"op": "copy"})),
            copy_alone=_rates(probes[:1], {"op": "copy"})[0],
        )


def _products(
    probes: Sequence[JsonProcess], spec: ModelSpec, dtype: str, known: set[str]
) -> dict[str, dict[str, float]]:
    """Rates at the sizes of the model of every implementation that is not known yet.

    What reaches less than a quarter of the best at the first size is not tried at others: it may take very long.
    """
    first, *others = [*layer_products(spec), (spec.hidden, spec.vocab)]

    def rate(name: str, size: tuple[int, int]) -> float:
        ask = {"op": "product", "name": name, "rows": ROWS, "k": size[0], "n": size[1]}
        return sum(_rates(probes, ask))

    names = [n for n in _all(probes[:1], {"op": "products", "dtype": dtype})[0] if n not in known]
    found = {name: {_size(first): rate(name, first)} for name in names}
    best = max((rates[_size(first)] for rates in found.values()), default=0.0)
    for name, rates in found.items():
        if 4 * rates[_size(first)] >= best:
            rates |= {_size(size): rate(name, size) for size in others}
    return found


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _rates(probes: Sequence[JsonProcess], message: dict[str, Any]) -> list[float]:
    return [float(value) for value in _all(probes, message)]


def _all(probes: Sequence[JsonProcess], message: dict[str, Any]) -> list[Any]:
    """The value that each of the probes measured, all at the same time."""
    limits = {"seconds": SECONDS, "bytes": ARRAY_BYTES}
    for probe in probes:
        probe.ask({**message, **limits, "op": "prepare", "of": message["op"]}, _PATIENCE)
    for probe in probes:
        probe.send(message)
    return [probe.receive(_PATIENCE)["value"] for probe in probes]


# ---- one rank's process ---------------------------------------------------------------------------------------


def _main(place: Place) -> None:
    import torch

    from seesaw.execution.placement import enter

    enter(place)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prepared: Callable[[], Any] = _nothing
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "close":
            return
        try:
            if message["op"] == "prepare":
                prepared = _prepare(message)
                value = None
            else:
                value = prepared()
            answer = {"event": "value", "value": value}
        except Exception as error:
            answer = {"event": "error", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _nothing() -> None:
    return None


def _prepare(message: dict[str, Any]) -> Callable[[], Any]:
    """Set memory up and run once, so that the measurement proper starts at once."""
    import torch

    if message["of"] == "products":
        names = implementations(message["dtype"])
        return lambda: names
    if message["of"] == "product":
        return _product(message["name"], message["rows"], message["k"], message["n"], message["seconds"])
    size, seconds = message["bytes"], message["seconds"]
    array = torch.ones(size // 4, dtype=torch.float32)
    if message["of"] == "read":
        numbers = array.numpy()
        readers: list[Callable[[], Any]] = [array.sum, lambda: numbers.dot(numbers)]
        return lambda: max(_best(reader, size, seconds) for reader in readers)
    target = torch.empty_like(array)
    target.copy_(array)
    return lambda: _best(lambda: target.copy_(array), size, seconds)


def implementations(dtype: str) -> list[str]:
    """Names of the products worth trying for weights of this type: `NAME TYPE`."""
    names = [f"torch {dtype}", "torch float32"]
    for kind in (dtype, "float32"):
        native = _native(kind)
        if native is not None and native.name != "torch":
            names.append(f"{native.name} {kind}")
    return list(dict.fromkeys(names))


def _native(dtype: str) -> Any:
    """The engine's own operators for a type, or None where there are none."""
    import importlib

    import torch

    try:
        select = importlib.import_module("seesaw.ops.select")
        return select.create_operators(device="cpu", dtype=getattr(torch, dtype))
    except (ImportError, AttributeError):
        return None


def _product(name: str, rows: int, k: int, n: int, seconds: float) -> Callable[[], float]:
    import torch

    kind, _, dtype = name.partition(" ")
    x = torch.randn(rows, k).to(getattr(torch, dtype))
    weight = torch.randn(n, k).to(getattr(torch, dtype))
    operators = None if kind == "torch" else _native(dtype)

    def call() -> object:
        if operators is not None:
            return operators.linear(x, weight)
        return torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        call()

    def run() -> float:
        with torch.inference_mode():
            return _best(call, 2.0 * rows * k * n, seconds)

    return run


def _best(call: Callable[[], object], amount: float, seconds: float) -> float:
    """Highest rate over the windows of `amount` per call."""
    best = 0.0
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        calls, elapsed = 0, 0.0
        while elapsed < seconds / _WINDOWS:
            call()
            calls += 1
            elapsed = time.perf_counter() - started
        best = max(best, calls * amount / elapsed)
    return best


if __name__ == "__main__":
    _main(msgspec.json.decode(sys.argv[1], type=Place))
