"""Matrix products on CPU cores: the native kernels against torch, by type, shape and number of rows.

    python benchmarks/linear.py                                        # the layers of a 270M and a 1.1B Llama
    python benchmarks/linear.py --cores 2                              # while two cores share the memory
    python benchmarks/linear.py --types bfloat16 --rows 8 32 --shapes 2048x1024 --seconds 1

Each cell shows GFLOP/s and the GB/s at which the weight is read, both of one core; a star marks what `CpuLinear`
takes. Weights lie in huge pages, as an engine's do, and are rotated through more memory than most caches hold, as the
layers of a model are. Candidates take turns, and the median call counts. The first line shows bounds: a square
float32 product by torch, in cache, and a plain sum over memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from cores import MEMORY, Call, Measure, Medians, add_options, bounds, measure_bounds, on_cores, rates
from torch import Tensor
from torch.nn import functional

from seesaw.device.host_memory import reserve
from seesaw.native.build import load
from seesaw.ops.cpu_linear import CpuLinear

SHAPES = "2048x1024 1024x1024 5632x1024 1024x2816 32000x1024 2560x2048 2048x2048 11264x2048 2048x5632".split()


def measure_all(linear: CpuLinear, args: argparse.Namespace, measure: Measure) -> None:
    """The bounds and every cell, on one core."""
    measure_bounds(measure)
    for dtype, columns, depth in matrices(args):
        weights = rotating(dtype, columns, depth)
        for rows in args.rows:
            measure(candidates(linear, torch.randn(rows, depth).to(dtype), weights))


def candidates(linear: CpuLinear, x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    """The ways to make a product, each by the number of the call."""
    count = len(weights)
    return [
        lambda turn: linear.native(x, weights[turn % count], packed=False),
        lambda turn: linear.native(x, weights[turn % count], packed=True),
        lambda turn: functional.linear(x, weights[turn % count]),
    ]


def rotating(dtype: torch.dtype, columns: int, depth: int) -> list[Tensor]:
    """Equal weights `[columns, depth]`, so many that they fill `MEMORY`."""
    size = columns * depth * dtype.itemsize
    count = MEMORY // size + 1
    region = reserve(count * size, "weights", filled=True)
    weights = torch.frombuffer(region, dtype=dtype).view(count, columns, depth)
    weights[:] = torch.randn(columns, depth).to(dtype)
    return list(weights)


def matrices(args: argparse.Namespace) -> Iterator[tuple[torch.dtype, int, int]]:
    """Types and shapes of weights, in the order of the table."""
    for name in args.types:
        for shape in args.shapes:
            columns, depth = map(int, shape.split("x"))
            yield getattr(torch, name), columns, depth


def show(linear: CpuLinear, args: argparse.Namespace, medians: Medians) -> None:
    """Print one line for each type, shape and number of rows."""
    print(bounds(medians))
    print(f"{'type':9} {'N x K':>12} {'M':>5}   native GF/s GB/s   packed GF/s GB/s    torch GF/s GB/s")
    for dtype, columns, depth in matrices(args):
        size = columns * depth
        for rows in args.rows:
            cells = rates(medians, 2 * rows * size, size * dtype.itemsize)
            cells[rows >= linear.packed_rows if linear.is_native(dtype) else 2] += " *"
            name, shape = str(dtype).removeprefix("torch."), f"{columns}x{depth}"
            print(f"{name:9} {shape:>12} {rows:5}   {cells[0]:18} {cells[1]:18} {cells[2]}", flush=True)


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K, such as 2048x1024")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 256, 2048])
    add_options(parser, 0.3)
    args = parser.parse_args()
    library = load()
    if library is None:
        parser.exit(1, "the native library cannot be built here\n")
    linear = CpuLinear(library)
    show(linear, args, on_cores(args, lambda measure: measure_all(linear, args, measure)))


if __name__ == "__main__":
    main()
