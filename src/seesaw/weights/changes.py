"""What one rank copies to get from the device tensors it has to those it needs. No torch.

Of every new tensor, the part the rank has already is copied on the device and only the difference is fetched
from the host store. Parameters are split along one dimension at most, so a difference is at most two boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.weights.intervals import DeviceTensor, Interval, Part, Region, region_size

Mode = Literal["resident", "delta", "reload"]
"""How a rank changes its sharding. `resident`: both shardings stay in memory, so that only the first change
to each moves anything. `delta`: kept boxes are copied, only the difference is fetched. `reload`: the old
sharding is dropped and the new one loaded whole."""


@dataclass(frozen=True, slots=True)
class KeepCopy:
    """Copy the box `origin` of the old device tensor `source` to the box `target` of the new one."""

    source: str
    origin: Region
    target: Region


@dataclass(frozen=True, slots=True)
class FetchCopy:
    """Copy the box `origin` of a parameter in the host store to the box `target` of the new device tensor."""

    parameter: str
    origin: Region
    target: Region


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How one new device tensor comes about.

    `source` is the old device tensor that its kept elements come from: the only one, and one that no other
    new tensor needs. With `reuse` it becomes the new tensor as it is, and nothing is copied.
    """

    tensor: DeviceTensor
    source: DeviceTensor | None
    reuse: bool
    keep: tuple[KeepCopy, ...]
    fetch: tuple[FetchCopy, ...]


@dataclass(frozen=True, slots=True)
class CopyList:
    """The change of one rank: its new device tensors in order, and the old ones that nothing is kept of."""

    changes: tuple[TensorChange, ...]
    dropped: tuple[DeviceTensor, ...]

    def bytes_fetched(self, dtype: str) -> int:
        """Bytes of `dtype` written from the host store."""
        return DTYPE_BYTES[dtype] * sum(
            region_size(fetch.target) for change in self.changes for fetch in change.fetch
        )

    def bytes_kept(self, dtype: str) -> int:
        """Bytes of `dtype` that the rank had already, copied on the device or left where they are."""
        return DTYPE_BYTES[dtype] * sum(
            change.tensor.size if change.reuse else sum(region_size(keep.target) for keep in change.keep)
            for change in self.changes
        )

    def bytes_copied(self, dtype: str) -> int:
        """Of `bytes_kept`, what is copied on the device, because its tensor has a new shape."""
        boxes = (keep.target for change in self.changes if not change.reuse for keep in change.keep)
        return DTYPE_BYTES[dtype] * sum(map(region_size, boxes))

    def steps(self) -> tuple[TensorChange, ...]:
        """The changes in the order that needs the least memory, done one by one, when every source is freed
        as soon as its new tensor is complete.

        First those that shrink, the smallest new tensor first; then those that grow, the largest old tensor
        first. So memory exceeds the larger of the two shardings by less than one tensor.
        """
        return tuple(sorted(self.changes, key=_step_order))


def _step_order(change: TensorChange) -> tuple[int, int]:
    if change.reuse:
        return (0, 0)
    old = change.source.size if change.source else 0
    new = change.tensor.size
    return (1, new) if new <= old else (2, -old)


def copy_list_between(old: tuple[DeviceTensor, ...], new: tuple[DeviceTensor, ...]) -> CopyList:
    """The change of a rank that has the tensors `old` and needs the tensors `new`."""
    held = {part.shard.parameter: (tensor, part) for tensor in old for part in tensor.parts}
    changes = tuple(_change(tensor, held) for tensor in new)
    used = [change.source.name for change in changes if change.source]
    assert len(used) == len(set(used)), "an old tensor serves one new tensor"
    return CopyList(changes, tuple(tensor for tensor in old if tensor.name not in set(used)))


_Held = Mapping[str, tuple[DeviceTensor, Part]]


def _change(tensor: DeviceTensor, held: _Held) -> TensorChange:
    keep: list[KeepCopy] = []
    fetch: list[FetchCopy] = []
    source: DeviceTensor | None = None
    for part in tensor.parts:
        wanted = part.shard.region
        found = held.get(part.shard.parameter)
        common = intersection(wanted, found[1].shard.region) if found else None
        if found and common:
            assert source is None or source is found[0], (
                "a fused tensor is always fused of the same parameters"
            )
            source = found[0]
            keep.append(KeepCopy(source.name, found[1].place(common), part.place(common)))
        missing = (wanted,) if common is None else difference(wanted, common)
        fetch.extend(FetchCopy(part.shard.parameter, box, part.place(box)) for box in missing)
    if source and source.parts == tensor.parts:
        return TensorChange(tensor, source, True, (), ())
    return TensorChange(tensor, source, False, tuple(keep), tuple(fetch))


def intersection(left: Region, right: Region) -> Region | None:
    """The box that two boxes share, or None."""
    shared = tuple(
        Interval(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(left, right, strict=True)
    )
    return shared if all(start < stop for start, stop in shared) else None


def difference(whole: Region, inner: Region) -> tuple[Region, ...]:
    """What is left of `whole` without `inner`, which lies in it and differs along one dimension at most."""
    dims = [dim for dim, (a, b) in enumerate(zip(whole, inner, strict=True)) if a != b]
    assert len(dims) <= 1, "parameters are split along one dimension"
    return tuple(
        (*whole[:dim], side, *whole[dim + 1 :])
        for dim in dims
        for side in (
            Interval(whole[dim].start, inner[dim].start),
            Interval(inner[dim].stop, whole[dim].stop),
        )
        if side.start < side.stop
    )


def peak_elements(old: tuple[DeviceTensor, ...], new: tuple[DeviceTensor, ...], mode: Mode) -> int:
    """Most elements in a rank's memory while it changes from `old` to `new`, both ends included."""
    before = sum(tensor.size for tensor in old)
    if mode == "reload":
        return max(before, sum(tensor.size for tensor in new))
    copies = copy_list_between(old, new)
    if mode == "resident":
        return before + sum(change.tensor.size for change in copies.changes if not change.reuse)
    return max(before, *_delta_levels(before, copies))


def _delta_levels(before: int, copies: CopyList) -> Iterator[int]:
    """Elements in memory at the fullest point of each step of a `delta` change."""
    level = before - sum(tensor.size for tensor in copies.dropped)
    for change in copies.steps():
        if not change.reuse:
            level += change.tensor.size
            yield level
            level -= change.source.size if change.source else 0
    yield level
