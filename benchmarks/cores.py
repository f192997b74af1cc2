"""Kernels that take turns, on one CPU core or on several at once: what they share is memory."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import torch

MEMORY = 192 << 20  # bytes of operands that take turns: more than most caches hold
ROUNDS = 4  # turns of each candidate
SQUARE = 768
Call = Callable[[int], object]
"""What is timed; gets the number of the call, so that operands can take turns."""
Measure = Callable[[Sequence[Call]], None]
Medians = Callable[[], list[float]]


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """How long, and on how many cores."""
    parser.add_argument("--seconds", type=float, default=seconds, help="of each candidate in a cell")
    parser.add_argument("--cores", type=int, default=1, help="that compute at the same time")


def on_cores(args: argparse.Namespace, work: Callable[[Measure], None]) -> Medians:
    """Run `work` in a process on each of `args.cores` cores; it calls its argument for every cell of a table.

    The answer gives the cells in that order: seconds of the median call of each candidate, the mean over the cores.
    Candidates take turns of some calls, which begin together on all cores and last for `args.seconds` in all, by the
    thread's own clock: the machine may be busy with other things. Ends the program if there are too few cores or a
    process fails.
    """
    ours = sorted(os.sched_getaffinity(0))
    if not 1 <= args.cores <= len(ours):
        sys.exit(f"--cores {args.cores}: this process may use 1 to {len(ours)}")
    context = get_context("fork")
    together = context.Barrier(args.cores)
    ends = []
    for core in ours[: args.cores]:
        end, theirs = context.Pipe(duplex=False)
        context.Process(target=_run, args=(core, together, theirs, args.seconds, work), daemon=True).start()
        theirs.close()
        ends.append(end)

    def medians() -> list[float]:
        try:
            return [statistics.mean(each) for each in zip(*(end.recv() for end in ends), strict=True)]
        except EOFError:
            sys.exit("a process that measures has ended")

    return medians


def measure_bounds(measure: Measure) -> None:
    """The first cell: what the machine can do at best, as far as torch shows it."""
    square, memory = torch.randn(SQUARE, SQUARE), torch.ones(MEMORY // 4)
    measure([lambda _: square @ square, lambda _: memory.sum()])


def bounds(medians: Medians) -> str:
    """The line that shows it."""
    product, read = medians()
    rate = f"{2 * SQUARE**3 / product / 1e9:.0f} GFLOP/s"
    return f"float32 {SQUARE}x{SQUARE}x{SQUARE}: {rate}; reading: {MEMORY / read / 1e9:.1f} GB/s"


def rates(medians: Medians, flops: float, size: float) -> list[str]:
    """GFLOP/s and GB/s of each candidate of the next cell: a call does `flops` operations and reads `size` bytes."""
    return [f"{flops / t / 1e9:6.1f} {size / t / 1e9:5.1f}" for t in medians()]


def _run(
    core: int, together: Barrier, results: Connection, seconds: float, work: Callable[[Measure], None]
) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        work(lambda calls: results.send(_take_turns(calls, together, seconds)))
    except BaseException:
        together.abort()  # or the others would wait for ever
        raise


def _take_turns(calls: Sequence[Call], together: Barrier, seconds: float) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    turn = 0
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            together.wait()
            end = time.perf_counter() + seconds / ROUNDS
            while not found or time.perf_counter() < end:
                begin = time.thread_time()
                call(turn)
                found.append(time.thread_time() - begin)
                turn += 1
    return [statistics.median(found) for found in times]
