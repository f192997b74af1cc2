"""Latency and bandwidth of the transports between the ranks of this machine.

    python benchmarks/transports.py                                       # all of them, 2 and 4 ranks
    python benchmarks/transports.py --transports shm --ranks 2 --types bfloat16 --sizes 64KiB 8MiB

Shows the time of an all-reduce among all ranks, and of a message from rank 0 to rank 1 and back, halved. Each figure
is the median of several rounds; the rate is the tensor's bytes over that time. Ranks are bound to a core each where
there are enough of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from seesaw.core.units import parse_bytes
from seesaw.transport.base import Transport
from seesaw.transport.select import KINDS, create_transport, resolve_kind
from seesaw.transport.shared_memory import create_region

SIZES = ("4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "8MiB")


def measure(transport: Transport, world: int, call: Callable[[], object], args: argparse.Namespace) -> float:
    """Median seconds of `call`, which all ranks make; their clocks agree on how often."""
    everyone = tuple(range(world))
    start = time.perf_counter()
    for _ in range(3):
        call()
    once = (time.perf_counter() - start) / 3
    repeats = torch.tensor([max(2, min(2000, int(args.seconds / args.rounds / max(once, 1e-6))))])
    transport.broadcast(repeats, everyone)
    times = []
    for _ in range(args.rounds):
        transport.all_reduce(torch.zeros(1), everyone)
        start = time.perf_counter()
        for _ in range(int(repeats)):
            call()
        times.append((time.perf_counter() - start) / int(repeats))
    return statistics.median(times)


def ping_pong(transport: Transport, rank: int, x: torch.Tensor) -> None:
    """A message from rank 0 to rank 1 and back."""
    if rank == 0:
        transport.send(x, 1, 0)
        transport.receive(x, 1, 0)
    elif rank == 1:
        transport.receive(x, 0, 0)
        transport.send(x, 0, 0)


def row(seconds: float, x: torch.Tensor) -> str:
    """A time, and the rate it means."""
    return f"{seconds * 1e6:10.1f} us {x.nbytes / seconds / 1e9:7.2f} GB/s"


def run_rank(kind: str, rank: int, world: int, region: int, directory: str, args: argparse.Namespace) -> None:
    """All sizes on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if world <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    everyone = tuple(range(world))
    transport = create_transport(
        kind,
        rank=rank,
        world=world,
        rendezvous=directory,
        groups=[everyone],
        open_region=lambda: os.dup(region),
        address="127.0.0.1" if kind == "tcp" else None,
    )
    for name in args.types:
        dtype = getattr(torch, name)
        for size in args.sizes:
            x = torch.zeros(parse_bytes(size) // dtype.itemsize, dtype=dtype)
            reduce = measure(transport, world, lambda x=x: transport.all_reduce(x, everyone), args)
            message = measure(transport, world, lambda x=x: ping_pong(transport, rank, x), args) / 2
            if rank == 0:
                print(f"{kind:5} {world:5} {name:9} {size:>7} {row(reduce, x)} {row(message, x)}", flush=True)
    transport.flush()
    transport.close()


def run_world(kind: str, world: int, args: argparse.Namespace) -> None:
    """Fork the ranks, rank 0 being this process's child like the others, and wait for them."""
    kind = resolve_kind(kind, world=world, addresses=kind == "tcp")
    region = create_region(world) if kind == "shm" else -1
    with tempfile.TemporaryDirectory() as directory:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run_rank(kind, rank, world, region, directory, args)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if region >= 0:
        os.close(region)
    if any(codes):
        raise SystemExit(f"{kind} with {world} ranks: exit codes {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", choices=KINDS[1:], default=list(KINDS[1:]))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure, about")
    args = parser.parse_args()
    print(f"{'':5} ranks {'type':9} {'size':>7} {'all-reduce':>13} {'':12} {'message':>13}")
    for kind in args.transports:
        for world in args.ranks:
            run_world(kind, world, args)


if __name__ == "__main__":
    main()
