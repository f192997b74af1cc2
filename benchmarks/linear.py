"""Matrix products on CPU cores: the native kernels against torch, by type, shape and number of rows.

    python benchmarks/linear.py                                        # the layers of a 270M and a 1.1B Llama
    python benchmarks/linear.py --cores 2                              # while two cores share the memory
    python benchmarks/linear.py --types bfloat16 --rows 8 32 --shapes 2048x1024 --seconds 1

Each cell shows GFLOP/s and the GB/s at which the weight is read, both of one core; a star marks what `CpuLinear`
takes. Weights lie in huge pages, as an engine's do, and are rotated through more memory than most caches hold, as the
layers of a model are. Candidates take turns of some calls, which begin together on all cores; the median call counts,
timed by the thread's own clock: the machine may be busy with other things. The first line shows bounds: a square
float32 product by torch, in cache, and a plain sum over memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor
from torch.nn import functional

from seesaw.device.host_memory import reserve
from seesaw.native.build import load
from seesaw.ops.cpu_linear import CpuLinear

SHAPES = "2048x1024 1024x1024 5632x1024 1024x2816 32000x1024 2560x2048 2048x2048 11264x2048 2048x5632".split()
MEMORY = 192 << 20  # bytes of weights that take turns
ROUNDS = 4  # turns of each candidate
SQUARE = 768
Call = Callable[[int], object]


class Core:
    """One process bound to a core, which makes the same calls as those of the other cores."""

    def __init__(self, number: int, together: Barrier, results: SimpleQueue[list[float]]) -> None:
        self._number, self._together, self._results = number, together, results

    def run(self, args: argparse.Namespace) -> None:
        """Measure the bounds and every cell, in the order in which `cells` names them."""
        os.sched_setaffinity(0, {self._number})
        torch.set_num_threads(1)
        library = load()
        assert library is not None, "main has looked"
        linear = CpuLinear(library)
        square, memory = torch.randn(SQUARE, SQUARE), torch.ones(MEMORY // 4)
        self._measure([lambda _: square @ square, lambda _: memory.sum()], args.seconds)
        for dtype, columns, depth in matrices(args):
            weights = rotating(dtype, columns, depth)
            for rows in args.rows:
                x = torch.randn(rows, depth).to(dtype)
                self._measure(candidates(linear, x, weights), args.seconds)

    def _measure(self, calls: Sequence[Call], seconds: float) -> None:
        times: list[list[float]] = [[] for _ in calls]
        turn = 0
        for _ in range(ROUNDS):
            for call, found in zip(calls, times, strict=True):
                self._together.wait()
                end = time.perf_counter() + seconds / ROUNDS
                while not found or time.perf_counter() < end:
                    begin = time.thread_time()
                    call(turn)
                    found.append(time.thread_time() - begin)
                    turn += 1
        self._results.put([statistics.median(found) for found in times])


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


def show(linear: CpuLinear, args: argparse.Namespace, medians: Callable[[], list[float]]) -> None:
    """Print one line for each type, shape and number of rows."""
    product, read = medians()
    rate = f"{2 * SQUARE**3 / product / 1e9:.0f} GFLOP/s"
    print(f"float32 {SQUARE}x{SQUARE}x{SQUARE}: {rate}; reading: {MEMORY / read / 1e9:.1f} GB/s")
    print(f"{'type':9} {'N x K':>12} {'M':>5}   native GF/s GB/s   packed GF/s GB/s    torch GF/s GB/s")
    for dtype, columns, depth in matrices(args):
        flops, size = 2 * columns * depth, columns * depth * dtype.itemsize
        for rows in args.rows:
            cells = [f"{rows * flops / t / 1e9:6.1f} {size / t / 1e9:5.1f}" for t in medians()]
            cells[rows >= linear.packed_rows if linear.is_native(dtype) else 2] += " *"
            name, shape = str(dtype).removeprefix("torch."), f"{columns}x{depth}"
            print(f"{name:9} {shape:>12} {rows:5}   {cells[0]:18} {cells[1]:18} {cells[2]}", flush=True)


def main() -> None:
    """Parse the arguments, start a process on each core and print what they find."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K, such as 2048x1024")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 256, 2048])
    parser.add_argument("--seconds", type=float, default=0.3, help="of each candidate in a cell")
    parser.add_argument("--cores", type=int, default=1, help="that compute at the same time")
    args = parser.parse_args()
    library, cores = load(), sorted(os.sched_getaffinity(0))[: args.cores]
    if library is None:
        sys.exit("the native library cannot be built here")
    if not 1 <= args.cores == len(cores):
        sys.exit(f"--cores {args.cores}: this process may use {len(os.sched_getaffinity(0))}")
    context = get_context("fork")
    together = context.Barrier(len(cores))
    queues: list[SimpleQueue[list[float]]] = [context.SimpleQueue() for _ in cores]
    for number, queue in zip(cores, queues, strict=True):
        context.Process(target=Core(number, together, queue).run, args=(args,), daemon=True).start()
    show(
        CpuLinear(library),
        args,
        lambda: [statistics.mean(each) for each in zip(*(queue.get() for queue in queues), strict=True)],
    )


if __name__ == "__main__":
    main()
