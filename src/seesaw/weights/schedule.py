"""In which order a rank that computes meanwhile makes its new tensors, within its memory. No torch.

On a device whose streams run beside each other, what fits into memory that is free can be copied before the old
sharding has done its last work (`ahead`); the rest takes the memory of what is freed then (`behind`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from seesaw.weights.changes import CopyList, TensorChange


@dataclass(frozen=True, slots=True)
class Schedule:
    """All changes of a copy list but those that reuse a tensor as it is."""

    ahead: tuple[TensorChange, ...]
    """To be made while every old tensor is still there."""
    behind: tuple[TensorChange, ...]
    """To be made after `CopyList.dropped` and the sources of `ahead` have been freed, each source being freed as soon
    as its new tensor is complete."""


def schedule(copies: CopyList, *, held: int, room: int) -> Schedule:
    """The schedule of a rank that holds `held` elements and may hold `room`, or as few more as there is a way to.

    In the order of the new tensors, layer by layer, where that keeps within `room`; else in the order that needs the
    least memory. The elements in memory then never exceed the larger of `room` and what `CopyList.steps` needs.
    """
    order = tuple(change for change in copies.changes if not change.reuse)
    left = held - sum(tensor.size for tensor in copies.dropped)
    if _peak(left, order) > room:
        order = tuple(change for change in copies.steps() if not change.reuse)
    count = 0
    for change in order:
        held += change.tensor.size
        if held > room:
            break
        count += 1
    return Schedule(order[:count], order[count:])


def all_at_once(copies: CopyList) -> Schedule:
    """The schedule where memory holds both shardings."""
    return Schedule(tuple(change for change in copies.changes if not change.reuse), ())


def _peak(level: int, order: Iterable[TensorChange]) -> int:
    """Most elements in memory while sources are freed one by one, from `level` on."""
    peak = level
    for change in order:
        level += change.tensor.size
        peak = max(peak, level)
        level -= change.source.size if change.source else 0
    return peak
