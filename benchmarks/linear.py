"""Matrix products on one CPU core: the native kernels against torch, by type, shape and number of rows.

    python benchmarks/linear.py                                        # the layers of a 270M and a 1.1B Llama
    python benchmarks/linear.py --types bfloat16 --rows 8 32 --shapes 2048x1024 --seconds 1

Each cell shows GFLOP/s and the GB/s at which the weight is read; a star marks what `CpuLinear` takes. Weights are
rotated through more memory than most caches hold, as the layers of a model are. Candidates take turns, and the
fastest turn counts, timed by the thread's own clock: the machine may be busy with other things. The first
line shows bounds: a square float32 product by torch, in cache, and a plain sum over memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from seesaw.native.build import load
from seesaw.ops.cpu_linear import CpuLinear

SHAPES = "2048x1024 1024x1024 5632x1024 1024x2816 32000x1024 2560x2048 2048x2048 11264x2048 2048x5632".split()
MEMORY = 192 << 20  # bytes of weights that take turns
Product = Callable[[Tensor, Tensor], Tensor]


def fastest(candidates: Sequence[Callable[[int], object]], seconds: float) -> list[float]:
    """Seconds of the fastest call of each; a call gets the number of the turn."""
    best, turn, end = [float("inf")] * len(candidates), 0, time.perf_counter() + seconds * len(candidates)
    while turn < 3 * len(candidates) or time.perf_counter() < end:
        for i, call in enumerate(candidates):
            begin = time.thread_time()
            call(turn)
            best[i] = min(best[i], time.thread_time() - begin)
            turn += 1
    return best


def bounds(seconds: float) -> str:
    """What the machine can do at best, as far as torch shows it."""
    square = torch.randn(768, 768)
    memory = torch.ones(MEMORY // 4)
    product, read = fastest([lambda _: square @ square, lambda _: memory.sum()], seconds)
    return f"float32 768x768x768: {2 * 768**3 / product / 1e9:.0f} GFLOP/s; reading: {MEMORY / read / 1e9:.1f} GB/s"


def measure(products: list[Product], weights: list[Tensor], rows: int, seconds: float) -> list[str]:
    """One cell for each product."""
    columns, depth = weights[0].shape
    x = torch.randn(rows, depth).to(weights[0].dtype)
    calls = [lambda turn, run=run: run(x, weights[turn % len(weights)]) for run in products]
    flops, size = 2 * rows * columns * depth, weights[0].nbytes
    return [f"{flops / t / 1e9:6.1f} {size / t / 1e9:5.1f}" for t in fastest(calls, seconds)]


def tables(linear: CpuLinear, args: argparse.Namespace) -> None:
    """Print one line for each type, shape and number of rows."""
    products: list[Product] = [
        lambda x, weight: linear.native(x, weight, packed=False),
        lambda x, weight: linear.native(x, weight, packed=True),
        functional.linear,
    ]
    print(f"{'type':9} {'N x K':>12} {'M':>5}   native GF/s GB/s   packed GF/s GB/s    torch GF/s GB/s")
    for name in args.types:
        dtype = getattr(torch, name)
        for shape in args.shapes:
            columns, depth = map(int, shape.split("x"))
            # one more than a multiple of the candidates: they take turns, and each shall meet all weights
            count = MEMORY // (columns * depth * dtype.itemsize) // len(products) * len(products) + 1
            weights = [torch.randn(columns, depth).to(dtype) for _ in range(count)]
            for rows in args.rows:
                cells = measure(products, weights, rows, args.seconds)
                cells[rows >= linear.packed_rows if linear.is_native(dtype) else 2] += " *"
                print(f"{name:9} {shape:>12} {rows:5}   {cells[0]:18} {cells[1]:18} {cells[2]}", flush=True)


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K, such as 2048x1024")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 256, 2048])
    parser.add_argument("--seconds", type=float, default=0.3, help="per cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = load()
    if library is None:
        parser.exit(1, "the native library cannot be built here\n")
    print(bounds(args.seconds))
    tables(CpuLinear(library), args)


if __name__ == "__main__":
    main()
