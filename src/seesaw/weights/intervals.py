"""Boxes of checkpoint parameters, and the device tensors stacked from them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple


class Interval(NamedTuple):
    """Indexes `start` … `stop - 1` of one dimension."""

    start: int
    stop: int


Region = tuple[Interval, ...]
"""A box of a tensor: one interval per dimension."""


def region_size(region: Region) -> int:
    """Number of elements of a box."""
    return prod(stop - start for start, stop in region)


def overlap(left: Region, right: Region) -> int:
    """Number of elements that two boxes of a tensor share."""
    return prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """The box of a checkpoint parameter that a rank holds, in the parameter's own indexes."""

    parameter: str
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the box."""
        return tuple(stop - start for start, stop in self.region)


@dataclass(frozen=True, slots=True)
class Part:
    """A shard and the row (index along dimension 0) of the device tensor at which it begins."""

    shard: Shard
    offset: int

    def place(self, region: Region) -> Region:
        """Where in the device tensor the box `region` of the parameter, which lies in the shard, is."""
        moved = [
            Interval(start - held.start, stop - held.start)
            for (start, stop), held in zip(region, self.shard.region, strict=True)
        ]
        rows = moved[0]
        return (Interval(rows.start + self.offset, rows.stop + self.offset), *moved[1:])


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """A tensor in a rank's memory: one shard, or several stacked along dimension 0 (QKV, gate-up)."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    matrix: bool = False
    """Whether quantised checkpoints store it in fewer bits (`models.parameters.Parameter`)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)
