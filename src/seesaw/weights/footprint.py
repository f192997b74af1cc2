"""Bytes of weights under a sharding, and of a change between two, for models of which many plans are looked at.

By the intervals and copy lists of the engine, with layers that are alike counted once, and each parameter in the
bits it is stored in. `sharding.plan_peak_bytes` says the same tensor by tensor, for weights of one type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from seesaw.core.model_spec import ModelSpec
from seesaw.core.moe import MoESpec
from seesaw.weights.changes import Mode, TensorChange, copy_list_between
from seesaw.weights.intervals import DeviceTensor, region_size
from seesaw.weights.sharding import LayerPart, Sharding, edge_tensors, layer_parts, part_tensors, shares


@dataclass(frozen=True, slots=True)
class Change:
    """What one rank holds and moves when it changes from one sharding to another, in bytes."""

    before: int
    after: int
    resident: int
    """With both shardings in memory, tensors that they share once."""
    delta: int
    """Most while tensors are changed one by one, in the order that needs the least memory."""
    fetched: int
    """From the host, of what the rank did not have."""
    copied: int
    """On the device, because the tensor has a new shape."""

    def peak(self, mode: Mode) -> int:
        """Most that the rank holds at any time, both ends included."""
        if mode == "reload":
            return max(self.before, self.after)
        return self.resident if mode == "resident" else self.delta


_Place = tuple[int, int]
"""(tp, index): a tensor-parallel index of a layout."""
_Edge = tuple[_Place, bool, bool]
"""Where a first or a last stage is, and which of the two."""
_NO_LAYERS = range(0)
_Held = tuple[_Place, bool, range] | None
"""What is held of a layer, if anything: where, whether its attention is part of it, and the FFN columns."""


_Order = tuple[int, float]
"""Where a step comes, as in `CopyList.steps`."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """The change of one layer, or of what surrounds the layers, in bits."""

    before: float
    after: float
    dropped: float
    fetched: float
    copied: float
    steps: tuple[tuple[_Order, float, float], ...]
    """Tensors that change their shape: bits of the new one, and of the old one that is freed after it."""


class Footprint:
    """Bytes of a model's weights by rank. Keeps what it has worked out: make one per model.

    `matrix_bits` are those of an element of the layers' matrices, `other_bits` of everything else.
    """

    def __init__(
        self, spec: ModelSpec, moe: MoESpec | None, *, matrix_bits: float, other_bits: float
    ) -> None:
        self.spec = spec
        self.moe = moe
        self.matrix_bits = matrix_bits
        self.other_bits = other_bits
        sparse = set(moe.sparse if moe else ())
        self._sparse_before = [0, *accumulate(layer in sparse for layer in range(spec.layers))]
        kinds = [
            [layer for layer in range(spec.layers) if (layer in sparse) == kind] for kind in (False, True)
        ]
        self._examples = [layers[0] if layers else None for layers in kinds]
        self._whole = range(spec.ffn)
        self._layers: dict[tuple[int, _Held, _Held], _Piece] = {}
        self._edges: dict[tuple[_Edge | None, _Edge | None], _Piece] = {}

    def held(self, sharding: Sharding) -> tuple[int, ...]:
        """Bytes of every rank of `sharding`, in the order of its ranks' numbers."""
        return tuple(change.after for change in self.changes(None, sharding))

    def changes(self, old: Sharding | None, new: Sharding) -> tuple[Change, ...]:
        """What every rank of `new` goes through that comes from `old` (None: it has nothing), in the order of the
        ranks' numbers."""
        was = {rank: place for place, rank in enumerate(old.ranks)} if old else {}
        alike: dict[tuple[int | None, int], Change] = {}
        found: dict[int, Change] = {}
        for place, rank in enumerate(new.ranks):
            before = was.get(rank)
            key = (
                before % old.layout.replica_ranks if old and before is not None else None,
                place % new.layout.replica_ranks,
            )
            if key not in alike:
                alike[key] = self._change(old if key[0] is not None else None, key[0] or 0, new, key[1])
            found[rank] = alike[key]
        return tuple(found[rank] for rank in sorted(found))

    def layer_bits(self) -> tuple[float, ...]:
        """Bits of each whole layer."""
        kinds = [
            0.0 if layer is None else self._layer(kind, None, self._all_of((1, 0))).after
            for kind, layer in enumerate(self._examples)
        ]
        ends = zip(self._sparse_before, self._sparse_before[1:], strict=False)
        return tuple(kinds[stop - start] for start, stop in ends)

    def undivided(self, fewer: int, more: int) -> int:
        """Bytes of all layers that are the same under two degrees of tensor parallelism: what is not divided."""
        kinds = zip(self._kinds(range(self.spec.layers)), self._between(fewer, more), strict=True)
        return _bytes(
            sum(n * (piece.after - sum(new for _, new, _ in piece.steps)) for n, piece in kinds if piece)
        )

    def excess(self, fewer: int, more: int, layers: int) -> int:
        """Most bytes by which a rank exceeds the larger of two shardings while its tensors change one by one.

        They have degrees `fewer` and `more` of tensor parallelism, and under `fewer` at least so many layers a rank.
        Tensors that shrink begin with the smallest, those that grow end with it. So a copy stands beside what the
        smaller ones have not freed yet; layers that are dropped or fetched as well only leave more room.
        """
        pieces = [piece for piece in self._between(fewer, more) if piece]
        each = layers if len(pieces) == 1 else 1
        edges = [self._bits([tensor]) for tensor in self._edge(((more, 0), True, True))]
        worst = 0.0
        for piece in pieces:
            freed = 0.0
            inside = [(new, old, each) for _, new, old in piece.steps]
            for new, old, count in sorted([*inside, *((size, size, 0) for size in edges)]):
                worst = max(worst, new - freed)
                freed += count * (old - new)
        return _bytes(worst)

    # ---- parts --------------------------------------------------------------------------------------------

    def _change(self, old: Sharding | None, old_place: int, new: Sharding, new_place: int) -> Change:
        before = after = dropped = fetched = copied = 0.0
        steps: list[tuple[_Order, float, float, int]] = []
        for count, piece in self._pieces(old, old_place, new, new_place):
            before += count * piece.before
            after += count * piece.after
            dropped += count * piece.dropped
            fetched += count * piece.fetched
            copied += count * piece.copied
            steps += [(*step, count) for step in piece.steps]
        steps.sort()
        level = before - dropped
        peak = max(before, level)
        fresh = 0.0
        for _, added, freed, count in steps:
            grown = count * (added - freed)
            peak = max(
                peak, level + added, level + grown + freed
            )  # alike steps peak at the first or the last
            level += grown
            fresh += count * added
        return Change(
            before=_bytes(before),
            after=_bytes(after),
            resident=_bytes(before + fresh),
            delta=_bytes(peak),
            fetched=_bytes(fetched),
            copied=_bytes(copied),
        )

    def _pieces(
        self, old: Sharding | None, old_place: int, new: Sharding, new_place: int
    ) -> Iterator[tuple[int, _Piece]]:
        """How many layers of each kind change in which way; and what surrounds them."""
        left, old_layers, old_edge = _placed(old, old_place)
        right, new_layers, new_edge = _placed(new, new_place)
        old_parts, new_parts = self._divided(old, old_place), self._divided(new, new_place)
        shared = range(max(old_layers.start, new_layers.start), min(old_layers.stop, new_layers.stop))
        kept, lost, gained = (list(self._kinds(layers)) for layers in (shared, old_layers, new_layers))
        for layer in sorted({*old_parts, *new_parts}):  # dense all of them
            was, is_now = layer in old_layers, layer in new_layers
            kept[0], lost[0], gained[0] = kept[0] - (was and is_now), lost[0] - was, gained[0] - is_now
            before = old_parts.get(layer, self._all_of(left) if was else None)
            after = new_parts.get(layer, self._all_of(right) if is_now else None)
            yield 1, self._layer(0, before, after)
        for kind in (0, 1):
            for count, pair in (
                (kept[kind], (left, right)),
                (lost[kind] - kept[kind], (left, None)),
                (gained[kind] - kept[kind], (None, right)),
            ):
                if count:
                    yield count, self._layer(kind, *map(self._all_of, pair))
        if (old_edge, new_edge) not in self._edges:
            self._edges[old_edge, new_edge] = self._piece(self._edge(old_edge), self._edge(new_edge))
        yield 1, self._edges[old_edge, new_edge]

    def _kinds(self, layers: range) -> tuple[int, int]:
        """How many of `layers` are dense and how many sparse."""
        sparse = self._sparse_before[layers.stop] - self._sparse_before[layers.start] if layers else 0
        return len(layers) - sparse, sparse

    def _all_of(self, place: _Place | None) -> _Held:
        """A whole layer at a place."""
        return place and (place, True, self._whole)

    def _divided(self, sharding: Sharding | None, place: int) -> dict[int, _Held]:
        """The layers of which a place in a replica has some, but not all."""
        if sharding is None or not sharding.carried:
            return {}
        stage, index = divmod(place, sharding.layout.tp)
        at = sharding.layout.tp, index
        return {
            part.layer: (at, part.attention, part.ffn)
            for part in layer_parts(self.spec, sharding, stage)
            if part.ffn != self._whole
        }

    def _layer(self, kind: int, old: _Held, new: _Held) -> _Piece:
        key = kind, old, new
        if key not in self._layers:
            example = self._examples[kind]
            assert example is not None, "no layer of this kind was counted"
            tensors = (self._tensors(example, held) for held in (old, new))
            self._layers[key] = self._piece(*tensors)
        return self._layers[key]

    def _tensors(self, layer: int, held: _Held) -> list[DeviceTensor]:
        if held is None:
            return []
        (tp, index), attention, ffn = held
        return part_tensors(self.spec, LayerPart(layer, attention, ffn), tp, index, self.moe)

    def _edge(self, edge: _Edge | None) -> list[DeviceTensor]:
        if edge is None:
            return []
        (tp, index), first, last = edge
        before, after = edge_tensors(
            self.spec, shares(self.spec, tp, self.moe)[index], first=first, last=last
        )
        return [*before, *after]

    def _between(self, fewer: int, more: int) -> list[_Piece | None]:
        """How a layer of each kind changes between the ranks that have the most of it."""
        return [
            None if example is None else self._layer(kind, self._all_of((fewer, 0)), self._all_of((more, 0)))
            for kind, example in enumerate(self._examples)
        ]

    def _piece(self, held: list[DeviceTensor], wanted: list[DeviceTensor]) -> _Piece:
        copies = copy_list_between(tuple(held), tuple(wanted))
        changed = [change for change in copies.changes if not change.reuse]
        sizes = (
            (self._bits([change.tensor]), self._bits([change.source] if change.source else []))
            for change in changed
        )
        return _Piece(
            before=self._bits(held),
            after=self._bits(wanted),
            dropped=self._bits(copies.dropped),
            fetched=sum(self._moved(change, kept=False) for change in changed),
            copied=sum(self._moved(change, kept=True) for change in changed),
            steps=tuple((_order(new, old), new, old) for new, old in sizes),
        )

    def _bits(self, tensors: Iterable[DeviceTensor]) -> float:
        return sum(tensor.size * self._element(tensor) for tensor in tensors)

    def _moved(self, change: TensorChange, *, kept: bool) -> float:
        copies = change.keep if kept else change.fetch
        return self._element(change.tensor) * sum(region_size(copy.target) for copy in copies)

    def _element(self, tensor: DeviceTensor) -> float:
        return self.matrix_bits if tensor.matrix else self.other_bits


def _placed(sharding: Sharding | None, place: int) -> tuple[_Place | None, range, _Edge | None]:
    """Tensor-parallel index, layers and edges of a place in a replica."""
    if sharding is None:
        return None, _NO_LAYERS, None
    layout = sharding.layout
    stage, index = divmod(place, layout.tp)
    at = layout.tp, index
    first, last = stage == 0, stage == layout.pp - 1
    return at, sharding.stages[stage], (at, first, last) if first or last else None


def _order(new: float, old: float) -> _Order:
    return (1, new) if new <= old else (2, -old)


def _bytes(bits: float) -> int:
    return ceil(bits / 8)
