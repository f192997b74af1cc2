"""Attention over the paged pool on one CPU core: the native kernel against torch, by batch and shape.

    python benchmarks/attention.py                                     # the heads of a 270M and a 1.1B Llama
    python benchmarks/attention.py --types bfloat16 --batches 8x544+1 --heads 16/8x64 --seconds 1

A batch is SEQUENCESxCONTEXT+NEW: so many sequences with so many tokens in the pool and so many new ones, hence
decode if one is new and prefill if the context is empty. Each cell shows GFLOP/s (of the pairs that causality leaves)
and the GB/s at which K and V are read. Layers of the pool take turns, as those of a model do. Candidates take turns
too, and the fastest turn counts, timed by the thread's own clock: the machine may be busy with other things.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch
from linear import MEMORY, bounds, fastest
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


def measure(
    backends: Sequence[AttentionBackend],
    batch: tuple[int, int, int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    seconds: float,
) -> list[str]:
    """One cell for each backend."""
    (sequences, context, new), (q_heads, kv_heads, head_dim) = batch, heads
    tables = make_batch(*batch)
    shape = (tables.block_tables.numel(), 2, kv_heads, BLOCK, head_dim)
    size = 2 * sequences * (context + new) * kv_heads * head_dim * dtype.itemsize
    # one more than a multiple of the candidates: they take turns, and each shall meet all layers
    layers = max(1, MEMORY // size) // len(backends) * len(backends) + 1
    pools = [torch.randn(shape).to(dtype) for _ in range(layers)]
    rows = torch.randn(sequences * new, q_heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = rows.split([q_heads, kv_heads, kv_heads], 1)

    def call(backend: AttentionBackend, turn: int) -> Tensor:
        return backend.attend(q, k, v, pools[turn % layers], tables, scale=head_dim**-0.5, window=None)

    calls = [lambda turn, backend=backend: call(backend, turn) for backend in backends]
    pairs = sequences * (new * context + new * (new + 1) // 2)
    flops = 4 * q_heads * head_dim * pairs
    return [f"{flops / t / 1e9:6.1f} {size / t / 1e9:5.1f}" for t in fastest(calls, seconds)]


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
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"])
    batches, heads_of = list(map(Batch, BATCHES)), list(map(Heads, HEADS))
    parser.add_argument("--batches", nargs="+", type=Batch, default=batches, help="such as 8x544+1")
    parser.add_argument("--heads", nargs="+", type=Heads, default=heads_of, help="such as 16/8x64")
    parser.add_argument("--seconds", type=float, default=0.5, help="per cell")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = load()
    if library is None:
        parser.exit(1, "the native library cannot be built here\n")
    backends: list[AttentionBackend] = [CpuAttention(library), TorchAttention()]
    print(bounds(args.seconds))
    print(f"{'type':9} {'heads':>8} {'batch':>12}   native GF/s GB/s    torch GF/s GB/s")
    for name in args.types:
        for heads in args.heads:
            for batch in args.batches:
                dtype = getattr(torch, name)
                cells = measure(backends, batch.numbers, heads.numbers, dtype, args.seconds)
                print(f"{name:9} {heads.text:>8} {batch.text:>12}   {cells[0]:18} {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
