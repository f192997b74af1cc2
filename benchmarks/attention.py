"""Attention over the paged pool on CPU cores: the native kernel against torch, by batch and shape.

    python benchmarks/attention.py                                     # the heads of a 270M and a 1.1B Llama
    python benchmarks/attention.py --cores 2                           # while two cores share the memory
    python benchmarks/attention.py --types bfloat16 --batches 8x544+1 --heads 16/8x64 --seconds 1

A batch is SEQUENCESxCONTEXT+NEW: so many sequences with so many tokens in the pool and so many new ones, hence
decode if one is new and prefill if the context is empty. Each cell shows GFLOP/s (of the pairs that causality leaves)
and the GB/s at which K and V are read, both of one core. Layers of the pool take turns, as those of a model do.
Candidates take turns too, and the median call counts. The first line shows bounds: a square float32 product by torch,
in cache, and a plain sum over memory.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence

import torch
from cores import MEMORY, Call, Measure, Medians, add_options, bounds, measure_bounds, on_cores, rates
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch
from seesaw.attention.cpu import CpuAttention
from seesaw.attention.torch_backend import TorchAttention
from seesaw.native.build import load

BATCHES = "16x544+1 64x127+1 64x128+1 8x2000+1 4x0+512 2x0+1024 2x1024+512".split()
HEADS = "16/8x64 32/4x64".split()
BLOCK = 16  # tokens


def make_batch(sequences: int, context: int, new: int) -> AttentionBatch:
    """Sequences of one length, whose blocks lie one after the other."""
    blocks = -(-(context + new) // BLOCK)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(context, context + new)
    slots = tables[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
    return AttentionBatch(
        query_starts=torch.arange(0, sequences * new + 1, new, dtype=torch.int32),
        context_starts=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=slots.flatten(),
        max_query=new,
    )


def candidates(
    backends: Sequence[AttentionBackend],
    batch: tuple[int, int, int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> list[Call]:
    """Attention of the batch by each backend, by the number of the call."""
    (sequences, _, new), (q_heads, kv_heads, head_dim) = batch, heads
    tables = make_batch(*batch)
    shape = (tables.block_tables.numel(), 2, kv_heads, BLOCK, head_dim)
    layers = MEMORY // bytes_read(batch, heads, dtype) + 1
    pools = [torch.randn(shape).to(dtype) for _ in range(layers)]
    rows = torch.randn(sequences * new, q_heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = rows.split([q_heads, kv_heads, kv_heads], 1)

    def call(backend: AttentionBackend, turn: int) -> Tensor:
        return backend.attend(q, k, v, pools[turn % layers], tables, scale=head_dim**-0.5, window=None)

    return [lambda turn, backend=backend: call(backend, turn) for backend in backends]


def bytes_read(batch: tuple[int, int, int], heads: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Of K and V, once."""
    (sequences, context, new), (_, kv_heads, head_dim) = batch, heads
    return 2 * sequences * (context + new) * kv_heads * head_dim * dtype.itemsize


def operations(batch: tuple[int, int, int], heads: tuple[int, int, int]) -> int:
    """Of both products, over the pairs that causality leaves."""
    (sequences, context, new), (q_heads, _, head_dim) = batch, heads
    return 4 * q_heads * head_dim * sequences * (new * context + new * (new + 1) // 2)


def cells(args: argparse.Namespace) -> Iterator[tuple[torch.dtype, Heads, Batch]]:
    """What is measured, in the order of the table."""
    for name in args.types:
        for heads in args.heads:
            for batch in args.batches:
                yield getattr(torch, name), heads, batch


def measure_all(backends: Sequence[AttentionBackend], args: argparse.Namespace, measure: Measure) -> None:
    """The bounds and every cell, on one core."""
    measure_bounds(measure)
    for dtype, heads, batch in cells(args):
        measure(candidates(backends, batch.numbers, heads.numbers, dtype))


def show(args: argparse.Namespace, medians: Medians) -> None:
    """Print one line for each type, shape and batch."""
    print(bounds(medians))
    print(f"{'type':9} {'heads':>8} {'batch':>12}   native GF/s GB/s    torch GF/s GB/s")
    for dtype, heads, batch in cells(args):
        size = bytes_read(batch.numbers, heads.numbers, dtype)
        native, by_torch = rates(medians, operations(batch.numbers, heads.numbers), size)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} {heads.text:>8} {batch.text:>12}   {native:18} {by_torch}", flush=True)


class Sizes:
    """Three numbers as they were written; raises `argparse.ArgumentTypeError` for another form."""

    pattern, example = r"", ""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(self.pattern, text)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {self.example}")
        first, second, third = map(int, found.groups())
        self.text, self.numbers = text, (first, second, third)


class Batch(Sizes):
    """Sequences, tokens in the pool and new tokens of each."""

    pattern, example = r"(\d+)x(\d+)\+(\d+)", "8x544+1"


class Heads(Sizes):
    """Heads of Q, heads of KV, channels."""

    pattern, example = r"(\d+)/(\d+)x(\d+)", "16/8x64"


def main() -> None:
    """Parse the arguments, measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"])
    batches, heads_of = list(map(Batch, BATCHES)), list(map(Heads, HEADS))
    parser.add_argument("--batches", nargs="+", type=Batch, default=batches, help="such as 8x544+1")
    parser.add_argument("--heads", nargs="+", type=Heads, default=heads_of, help="such as 16/8x64")
    add_options(parser, 0.5)
    args = parser.parse_args()
    library = load()
    if library is None:
        parser.exit(1, "the native library cannot be built here\n")
    backends: list[AttentionBackend] = [CpuAttention(library), TorchAttention()]
    show(args, on_cores(args, lambda measure: measure_all(backends, args, measure)))


if __name__ == "__main__":
    main()
