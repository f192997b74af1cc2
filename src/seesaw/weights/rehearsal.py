"""How large an arena the transitions of a plan need. No torch.

Tensors are cut up and put together one by one, which leaves gaps that the next one may not fit. But the transitions
of a job are always the same two: they are played through beforehand, on arenas of growing sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.weights.arena import Arena
from seesaw.weights.changes import TensorChange
from seesaw.weights.intervals import DeviceTensor
from seesaw.weights.sharding import Sharding, copy_list

_STEPS = 32
"""Sizes are tried in steps of this part of the budget,"""
_MOST = 10
"""at most so many of them beyond it."""
_TURNS = 24
"""Transitions that are played, if what lies where does not repeat itself sooner."""


def arena_bytes(spec: ModelSpec, shardings: Sequence[Sharding], rank: int, dtype: str, budget: int) -> int:
    """Bytes of an arena that has a place for every tensor of `rank` in all `delta` transitions between two shardings.

    `budget` are the bytes of all tensors at the fullest moment. If a third more is not enough, that much: single
    tensors find no place in it at times.
    """
    first, second = shardings
    ways = ((None, first), (first, second), (second, first))
    changes = [copy_list(spec, old, new, rank) for old, new in ways]
    acts = [(copies.dropped, copies.steps()) for copies in changes]
    sizes = [budget + budget * extra // _STEPS for extra in range(_MOST + 1)]
    return next((size for size in sizes if _suffices(Arena(size), acts, DTYPE_BYTES[dtype])), sizes[-1])


_Act = tuple[tuple[DeviceTensor, ...], tuple[TensorChange, ...]]
"""A change of sharding in the order of `RankWeights`: tensors that are dropped, then changes one by one."""
_Places = dict[str, tuple[int, int]]
"""Offset and bytes of tensors."""


def _suffices(arena: Arena, acts: Sequence[_Act], width: int) -> bool:
    """Whether every tensor finds a place: of the first sharding, then of the second and the first in turn."""
    load, *turns = acts
    held = _played(arena, {}, load, width)
    seen = list[_Places]()
    for turn in range(_TURNS):
        if held is None or held in seen:
            break
        if turn % 2 == 0:
            seen.append(held)
        held = _played(arena, held, turns[turn % 2], width)
    return held is not None


def _played(arena: Arena, held: _Places, act: _Act, width: int) -> _Places | None:
    """Where the new tensors lie, or None if one finds no place."""
    dropped, changes = act
    for tensor in dropped:
        arena.give(*held[tensor.name])
    made: _Places = {}
    for change in changes:
        name, source = change.tensor.name, change.source
        if change.reuse:
            assert source is not None
            made[name] = held[source.name]
            continue
        size = change.tensor.size * width
        place = arena.take(size)
        if place is None:
            return None
        made[name] = place, size
        if source is not None:
            arena.give(*held[source.name])
    return made
