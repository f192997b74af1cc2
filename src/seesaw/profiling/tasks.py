"""What is measured, as data: the node carries tasks out, and the fit looks their times up again. No torch.

Sizes are those of small models where ranks are CPU cores, and of large ones on accelerators, which nothing smaller
fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seesaw.core.devices import device_kind

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048)
PREFILLS = ((16, 64), (8, 128), (4, 256), (2, 512), (1, 1024), (1, 2048))
"""(prompts, tokens of each) that prefill attention is measured with: batches as the engine makes them, by rising
flops."""
DECODES = ((1, 64), (1, 256), (4, 256), (16, 256), (48, 256), (48, 512), (64, 768))
"""(sequences, tokens of each) that decode attention is measured with."""
LINK_SIZES = tuple(1 << bits for bits in range(12, 26, 2))
"""Bytes: 4 KiB to 16 MiB."""
MEETING_ROWS = (1, 8, 64, 512)
"""Of products behind which ranks of a group meet: a step of one sequence, of some, of many, a chunk of a prompt."""
COPIES = ("to_host", "to_device")
"""Of KV."""
CHANGES = ("within", "fetch")
"""Of weights: copies within a rank, and from the host."""
DEVICE_PREFILLS = ((16, 128), (4, 512), (2, 1024), (1, 2048), (2, 2048), (1, 8192))
DEVICE_DECODES = ((1, 256), (4, 256), (16, 512), (64, 512), (128, 1024), (256, 1024))
"""The same on accelerators."""
STEP_LAYERS = (2, 10)
"""Of the two models whose steps are compared: their difference is what layers cost, the rest is the step's."""


@dataclass(frozen=True, slots=True)
class Task:
    """A measurement: what, of which size, and whether one rank makes it alone."""

    op: str
    arguments: tuple[tuple[str, Any], ...]
    alone: bool = False

    @property
    def label(self) -> str:
        """A few words for the progress bar."""
        words = [str(value) for _, value in self.arguments if isinstance(value, int | str)]
        return " ".join([self.op.replace("_", "-"), *words])

    def sent(self) -> dict[str, Any]:
        """The arguments as a rank takes them."""
        return {
            name: dict(zip(("query", "kv", "dim"), value, strict=True)) if name == "heads" else value
            for name, value in self.arguments
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of operands."""

    products: tuple[tuple[int, int], ...]
    """(depth, columns) of a layer's weights: Q, K and V; output; gate and up; down."""
    heads: tuple[int, int, int]
    """(query heads, KV heads, head_dim) of attention."""
    fewer_kv: tuple[int, int, int]
    """The same with fewer KV heads, which tells their part."""
    hidden: int
    ffn: int
    prefills: tuple[tuple[int, int], ...] = PREFILLS
    decodes: tuple[tuple[int, int], ...] = DECODES
    activation_rows: int = 256


def sizes_for(device: str) -> Sizes:
    """What fills a rank of this kind."""
    if device_kind(device).on_host:
        return Sizes(
            products=((1024, 2048), (1024, 1024), (1024, 5632), (2816, 1024)),
            heads=(16, 8, 64),
            fewer_kv=(16, 2, 64),
            hidden=1024,
            ffn=2816,
        )
    return Sizes(
        products=((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
        heads=(32, 8, 128),
        fewer_kv=(32, 2, 128),
        hidden=4096,
        ffn=14336,
        prefills=DEVICE_PREFILLS,
        decodes=DEVICE_DECODES,
        activation_rows=2048,
    )


def group_sizes(ranks: int) -> list[int]:
    """Groups whose all-reduce is measured: those that fill the node, and powers of two."""
    powers = {1 << bits for bits in range(1, ranks.bit_length())}
    return sorted(n for n in range(2, ranks + 1) if ranks % n == 0 or n in powers)


def step(layers: int, dtype: str) -> Task:
    """A decode step of a small model; on CPU ranks without its operators."""
    return Task("step", (("layers", layers), ("dtype", dtype)))


def tiny(dtype: str) -> Task:
    """Operators with next to nothing to do."""
    return Task("tiny", (("dtype", dtype),))


def product(dtype: str, rows: int, sizes: Sizes) -> Task:
    """`rows` rows by the weights of a layer."""
    return Task("product", (("dtype", dtype), ("rows", rows), ("products", sizes.products)))


def attention(dtype: str, heads: tuple[int, int, int], sequences: int, tokens: int, new: int) -> Task:
    """Of sequences that feed `new` of their `tokens` tokens."""
    arguments = (
        ("dtype", dtype),
        ("heads", heads),
        ("sequences", sequences),
        ("tokens", tokens),
        ("new", new),
    )
    return Task("attention", arguments)


def activations(dtype: str, sizes: Sizes) -> Task:
    """Norms, rotation and SwiGLU of one layer."""
    arguments = (("dtype", dtype), ("heads", sizes.heads), ("rows", sizes.activation_rows))
    return Task("activations", (*arguments, ("hidden", sizes.hidden), ("ffn", sizes.ffn)))


def all_reduce(dtype: str, size: int, count: int) -> Task:
    """`count` bytes in groups of `size`."""
    return Task("all_reduce", (("dtype", dtype), ("size", size), ("count", count)))


def waiting(dtype: str, size: int, rows: int, sizes: Sizes) -> Task:
    """For the slowest rank of a group of `size`, behind `rows` rows by the weights of a layer: a share of their time,
    with the smallest all-reduce."""
    arguments = (("dtype", dtype), ("size", size), ("rows", rows), ("products", sizes.products))
    return Task("waiting", arguments)


def send(dtype: str, count: int) -> Task:
    """`count` bytes to the next rank."""
    return Task("send", (("dtype", dtype), ("count", count)))


def copy(kind: str, dtype: str, sizes: Sizes, *, alone: bool) -> Task:
    """Seconds a byte."""
    arguments: tuple[tuple[str, Any], ...] = (("kind", kind), ("dtype", dtype), ("heads", sizes.heads))
    return Task("copy", arguments, alone)


def reshard(kind: str, dtype: str) -> Task:
    """Seconds a byte."""
    return Task("reshard", (("kind", kind), ("dtype", dtype)))


def all_tasks(ranks: int, dtypes: Sequence[str], device: str) -> list[Task]:
    """Everything, in an order in which links come with rising sizes."""
    sizes, first = sizes_for(device), dtypes[0]
    tasks = [tiny(first), *(step(layers, first) for layers in STEP_LAYERS)]
    for dtype in dtypes:
        tasks += [product(dtype, rows, sizes) for rows in ROWS]
        for heads in (sizes.heads, sizes.fewer_kv) if device_kind(device).on_host else (sizes.heads,):
            tasks += [attention(dtype, heads, count, tokens, tokens) for count, tokens in sizes.prefills]
        tasks += [attention(dtype, sizes.heads, count, tokens, 1) for count, tokens in sizes.decodes]
    tasks.append(activations(first, sizes))
    tasks += [all_reduce(first, size, count) for size in group_sizes(ranks) for count in LINK_SIZES]
    if device_kind(device).on_host:
        tasks += [waiting(first, size, rows, sizes) for size in group_sizes(ranks) for rows in MEETING_ROWS]
    if ranks > 1:
        tasks += [send(first, count) for count in LINK_SIZES]
    tasks += [copy(kind, first, sizes, alone=alone) for kind in COPIES for alone in (True, False)]
    return tasks + [reshard(kind, first) for kind in CHANGES]
