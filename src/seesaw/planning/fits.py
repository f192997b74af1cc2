"""What to say of a model that fits under no layout of a node: how much is missing, and what would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from seesaw.core.devices import device_kind
from seesaw.core.errors import LayoutError, MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout
from seesaw.core.units import format_bytes
from seesaw.planning.books import Books
from seesaw.planning.catalogue.data import devices
from seesaw.planning.catalogue.names import MAX_RANKS
from seesaw.planning.demand import Demand, distinct_demands
from seesaw.planning.setup import Limits
from seesaw.planning.shapes import WEIGHT_BITS, PlannedModel
from seesaw.planning.shardings import sharding_for
from seesaw.weights.sharding import check_layout

_NODES = (2, 4, *range(8, MAX_RANKS + 1, 8))
"""Numbers of devices that are offered."""
_LARGER = 1.3
"""By which a second device that is offered has more memory than the first."""


def nothing_fits(
    model: PlannedModel, hardware: HardwareSpec, limits: Limits, dtype: str = "bfloat16"
) -> MemoryBudgetError:
    """The error for a model that fits under no layout of `hardware`, or under none of the plans that were asked for.

    One sentence: what the least demanding layout needs of a rank, what the node has, and what would do: how many of
    these devices, which of the catalogue's in the same number, weights of fewer bits, shorter sequences. A device is
    taken to give the same share of its memory as `limits` take of `hardware`.
    """
    node = _Node(hardware.ranks, limits.device_memory, tuple(hardware.all_reduce))
    asked = _Question(limits, dtype)
    need = asked.least_need(model, node)
    name, size = f"{node.ranks}x{hardware.name}", format_bytes(model.weight_bytes())
    text = f"{model.name} ({size} of weights)"
    if need is None:
        return MemoryBudgetError(f"{text} cannot be divided among {name}; try another number of ranks")
    has, least = format_bytes(node.memory), format_bytes(need.bytes)
    if need.bytes <= node.memory:
        return MemoryBudgetError(
            f"{text} fits none of the plans tried on {name} ({has} each), but {need.layout} needs only {least} a "
            "rank; try that, or a smaller chunk or max_model_len"
        )
    length = f" for sequences of {limits.max_model_len} tokens" if limits.max_model_len else ""
    return MemoryBudgetError(
        f"{text} fits no layout of {name} ({has} each): {need.layout} needs at least {least} a rank{length}; "
        f"{_either([*_nodes(asked, model, hardware, node), *_smaller(asked, model, node)])}"
    )


@dataclass(frozen=True, slots=True)
class _Node:
    ranks: int
    memory: int
    """Bytes of a rank."""
    groups: tuple[int, ...] | None = None
    """Degrees of tensor parallelism beside 1 that it can run; None is all."""

    def layouts(self, model: PlannedModel) -> Iterator[Layout]:
        """Those of one replica: nothing needs less memory."""
        for tp in range(1, self.ranks + 1):
            if self.ranks % tp == 0 and (tp == 1 or self.groups is None or tp in self.groups):
                layout = Layout(pp=self.ranks // tp, tp=tp)
                try:
                    check_layout(model.spec, layout, model.moe)
                except LayoutError:
                    continue
                yield layout


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that the fullest rank of a layout needs."""

    bytes: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Question:
    """Under which limits a model is to fit."""

    limits: Limits
    dtype: str

    def fits(self, model: PlannedModel, node: _Node) -> bool:
        """Whether some layout of the node has room for the model and one sequence of the greatest length."""
        need = self.least_need(model, node)
        return need is not None and need.bytes <= node.memory

    def least_need(self, model: PlannedModel, node: _Node) -> _Need | None:
        """Of a static plan, as `plan_memory` has it; None if no layout divides the model."""
        needs = (_Need(self._need(model, layout), layout) for layout in node.layouts(model))
        return min(needs, key=lambda need: need.bytes, default=None)

    def longest(self, model: PlannedModel, node: _Node) -> int:
        """Tokens of the longest sequence that some layout has room for; 0 if none has for any."""
        found = [0]
        for layout in node.layouts(model):
            budget = replace(
                self.limits.budget(layout, separate=False), device=node.memory, max_model_len=None
            )
            books = Books(model, self.dtype, budget, (layout, layout))
            found.append(books.longest(books.blocks(_ranks(model, layout), "resident")))
        return max(found)

    def _need(self, model: PlannedModel, layout: Layout) -> int:
        books = Books(model, self.dtype, self.limits.budget(layout, separate=False), (layout, layout))
        blocks = -(-(self.limits.max_model_len or 2) // self.limits.block_size)
        return max(
            rank.peaks[0] + books.workspace(rank, "resident") + blocks * books.block_bytes(rank)[0]
            for rank in _ranks(model, layout)
        )


def _ranks(model: PlannedModel, layout: Layout) -> tuple[Demand, ...]:
    sharding = sharding_for(model, layout, "both")
    return distinct_demands(model, (sharding, sharding))


def _nodes(asked: _Question, model: PlannedModel, hardware: HardwareSpec, node: _Node) -> Iterator[str]:
    """More of these devices, and larger ones in the same number; of a profiled machine, more memory."""
    if device_kind(hardware.device).on_host:
        need = asked.least_need(model, node)
        assert need is not None, "only asked of models that can be divided"
        yield f"{format_bytes(need.bytes)} of memory a rank"
        return
    more = (n for n in _NODES if n > node.ranks and asked.fits(model, _Node(n, node.memory)))
    for ranks in islice(more, 1):
        yield f"{ranks}x{hardware.name}"
    share, offered = node.memory / hardware.memory, 0
    for device in sorted(devices().values(), key=lambda device: device.memory_mib):
        memory = int((device.memory_mib << 20) * share)
        if memory > max(node.memory, _LARGER * offered) and asked.fits(model, _Node(node.ranks, memory)):
            yield f"{node.ranks}x{device.name}"
            if offered:
                return
            offered = memory


def _smaller(asked: _Question, model: PlannedModel, node: _Node) -> Iterator[str]:
    """Weights of fewer bits, or shorter sequences, on the node itself."""
    for name in ("fp8", "int4"):
        bits = WEIGHT_BITS[name]
        if bits < model.weight_bits and asked.fits(replace(model, weight_bits=bits), node):
            yield f"{name} weights"
            break
    longest = asked.longest(model, node)
    if asked.limits.max_model_len and longest:
        yield f"sequences of at most {longest} tokens"


def _either(ways: list[str]) -> str:
    if not ways:
        return f"no node of up to {MAX_RANKS} of the catalogue's devices would do, nor int4 weights"
    text = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"
    return f"{text} would do"
