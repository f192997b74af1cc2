"""Which rank takes which place of a new sharding, so that changing over moves least. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seesaw.core.model_spec import ModelSpec
from seesaw.core.moe import MoESpec
from seesaw.models.parameters import Parameter, edge_parameters, head_parameter, layer_parameters
from seesaw.weights.intervals import Region, overlap
from seesaw.weights.sharding import Sharding, layer_parts, part_tensors, shares


class Units(NamedTuple):
    """What an element weighs: whole numbers in the ratio of the bits that it is stored in."""

    matrix: int
    other: int


ALIKE = Units(1, 1)


def assign_ranks(
    spec: ModelSpec, old: Sharding, new: Sharding, moe: MoESpec | None = None, units: Units = ALIKE
) -> Sharding:
    """`new` with its ranks permuted so that changing from `old` fetches the fewest bytes over all ranks.

    Among equals, as many ranks as possible stay where `new` has them. Ranks that `old` does not include have
    nothing to keep.
    """
    by_place = kept_elements(spec, old, new, moe, units)
    world, width = new.layout.world, new.layout.replica_ranks
    value: list[list[int]] = []
    for row, rank in enumerate(new.ranks):
        kept = [0] * world
        if rank in old.ranks:
            kept = by_place[old.ranks.index(rank) % old.layout.replica_ranks].tolist() * (world // width)
        # The count of ranks that stay can only decide between equal sums of kept elements.
        value.append([elements * (world + 1) + (column == row) for column, elements in enumerate(kept)])
    taken = {column: new.ranks[row] for row, column in enumerate(greatest_sum(value))}
    return replace(new, ranks=tuple(taken[index] for index in range(world)))


def kept_elements(
    spec: ModelSpec, old: Sharding, new: Sharding, moe: MoESpec | None = None, units: Units = ALIKE
) -> NDArray[np.int64]:
    """Elements, in `units`, that a rank keeps which changes places: `[old place, new place]`, each in a replica.

    Places are counted with tp fastest, then pp. Depends on layouts and stages, not on who sits where.
    """
    sparse = set(moe.sparse if moe else ())
    divided = {
        stage.start - 1 for s in (old, new) for stage, n in zip(s.stages, s.carried, strict=False) if n
    }
    dense = [layer for layer in range(spec.layers) if layer not in sparse | divided]
    kept = np.zeros((old.layout.replica_ranks, new.layout.replica_ranks), dtype=np.int64)
    for alike in (dense, sorted(sparse)):
        if alike:
            table = layer_parameters(spec, alike[0], moe)
            each = sum(_overlap_elements(spec, parameter, old, new, moe, units) for parameter in table)
            kept += np.kron(_layers_shared(alike, old, new), each)
    if divided:
        kept += _overlap_of_divided(spec, divided, old, new, units)
    for parameter in edge_parameters(spec):
        stages = np.outer(_stages_with(spec, parameter, old), _stages_with(spec, parameter, new))
        kept += np.kron(stages, _overlap_elements(spec, parameter, old, new, moe, units))
    return kept


def _overlap_elements(
    spec: ModelSpec, parameter: Parameter, old: Sharding, new: Sharding, moe: MoESpec | None, units: Units
) -> NDArray[np.int64]:
    """Elements of `parameter` that an old and a new tensor-parallel index share, in `units`."""
    weight = units.matrix if parameter.matrix else units.other
    if parameter.split is None:
        return np.full((old.layout.tp, new.layout.tp), parameter.size * weight, dtype=np.int64)
    axis, dim, unit = parameter.split.axis, parameter.split.dim, parameter.split.unit
    left, right = ([getattr(share, axis) for share in shares(spec, s.layout.tp, moe)] for s in (old, new))
    return _overlap(left, right) * (parameter.size // parameter.shape[dim] * unit * weight)


def _overlap_of_divided(
    spec: ModelSpec, layers: Set[int], old: Sharding, new: Sharding, units: Units
) -> NDArray[np.int64]:
    """`kept_elements` of layers of which some stage has a part, box by box."""
    kept = np.zeros((old.layout.replica_ranks, new.layout.replica_ranks), dtype=np.int64)
    held = [_boxes(spec, layers, sharding, units) for sharding in (old, new)]
    for place, boxes in enumerate(held[0]):
        for other, wanted in enumerate(held[1]):
            kept[place, other] = sum(
                weight * overlap(region, wanted[name][0])
                for name, (region, weight) in boxes.items()
                if name in wanted
            )
    return kept


def _boxes(
    spec: ModelSpec, layers: Set[int], sharding: Sharding, units: Units
) -> list[dict[str, tuple[Region, int]]]:
    """What each place of a replica has of `layers`: boxes by parameter, and what an element weighs."""
    tp = sharding.layout.tp
    return [
        {
            part.shard.parameter: (part.shard.region, units.matrix if tensor.matrix else units.other)
            for of_layer in layer_parts(spec, sharding, stage)
            if of_layer.layer in layers
            for tensor in part_tensors(spec, of_layer, tp, index)
            for part in tensor.parts
        }
        for stage in range(sharding.layout.pp)
        for index in range(tp)
    ]


def _layers_shared(layers: Sequence[int], old: Sharding, new: Sharding) -> NDArray[np.int64]:
    """How many of `layers` an old and a new stage have both."""
    before = np.searchsorted(layers, np.arange(old.stages[-1].stop + 1))  # layers in front of each
    starts = np.maximum.outer(_starts(old.stages), _starts(new.stages))
    stops = np.maximum(np.minimum.outer(_stops(old.stages), _stops(new.stages)), starts)
    shared: NDArray[np.int64] = (before[stops] - before[starts]).astype(np.int64)
    return shared


def _overlap(left: Sequence[range], right: Sequence[range]) -> NDArray[np.int64]:
    """Lengths of the intersections of all pairs."""
    starts = np.maximum.outer(_starts(left), _starts(right))
    shared: NDArray[np.int64] = np.maximum(np.minimum.outer(_stops(left), _stops(right)) - starts, 0)
    return shared


def _starts(ranges: Iterable[range]) -> NDArray[np.int64]:
    return np.array([r.start for r in ranges], dtype=np.int64)


def _stops(ranges: Iterable[range]) -> NDArray[np.int64]:
    return np.array([r.stop for r in ranges], dtype=np.int64)


def _stages_with(spec: ModelSpec, parameter: Parameter, sharding: Sharding) -> NDArray[np.int64]:
    """1 for the stages that hold an edge parameter, else 0."""
    stages = np.zeros(sharding.layout.pp, dtype=np.int64)
    if parameter.place == "embed":
        stages[0] = 1
    if parameter.place == "head" or parameter.name == head_parameter(spec):
        stages[-1] = 1
    return stages


def greatest_sum(value: Sequence[Sequence[int]]) -> list[int]:
    """The column of each row of a square matrix, no column twice, for which the values add up to the most.

    Shortest augmenting paths (Crouse, "On implementing 2D rectangular assignment algorithms", 2016), as in
    `scipy.optimize.linear_sum_assignment` and with its choice among equals; importing that takes longer than all
    the rest of setting a plan up.
    """
    search = _Paths(value)
    for row in range(len(value)):
        search.add(row)
    return search.of_row


class _Paths:
    """Rows that have a column each, and the prices that show that no other choice is better."""

    def __init__(self, value: Sequence[Sequence[int]]) -> None:
        self.of_row = [-1] * len(value)
        self._value = value
        self._of_column = [-1] * len(value)
        self._row_price = [0] * len(value)
        self._column_price = [0] * len(value)

    def add(self, start: int) -> None:
        """Give row `start` a column; rows before it may change theirs."""
        distance: list[float] = [inf] * len(self._value)
        came_from = [-1] * len(self._value)
        remaining = list(range(len(self._value)))[::-1]
        rows, columns = [start], list[int]()
        lowest = 0
        while True:
            place = self._nearest(rows[-1], lowest, remaining, distance, came_from)
            column = remaining[place]
            lowest = int(distance[column])
            columns.append(column)
            remaining[place] = remaining[-1]
            remaining.pop()
            if self._of_column[column] < 0:
                break
            rows.append(self._of_column[column])
        self._reprice(rows, columns, lowest, distance)
        self._turn(start, column, came_from)

    def _nearest(
        self, row: int, lowest: int, remaining: list[int], distance: list[float], came_from: list[int]
    ) -> int:
        """Where in `remaining` the column is that is reached at the least cost, by `row` or the rows before it."""
        values, base = self._value[row], lowest - self._row_price[row]
        best, at = inf, -1
        for place, column in enumerate(remaining):
            through = base - values[column] - self._column_price[column]
            if through < distance[column]:
                distance[column], came_from[column] = through, row
            if distance[column] < best or (distance[column] == best and self._of_column[column] < 0):
                best, at = distance[column], place
        return at

    def _reprice(self, rows: list[int], columns: list[int], lowest: int, distance: list[float]) -> None:
        self._row_price[rows[0]] += lowest
        for row in rows[1:]:
            self._row_price[row] += lowest - int(distance[self.of_row[row]])
        for column in columns:
            self._column_price[column] -= lowest - int(distance[column])

    def _turn(self, start: int, column: int, came_from: list[int]) -> None:
        """Give every row on the path that ends at `column` the column after it."""
        row = -1
        while row != start:
            row = came_from[column]
            self._of_column[column] = row
            self.of_row[row], column = column, self.of_row[row]
