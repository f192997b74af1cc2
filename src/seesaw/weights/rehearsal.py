"""How large an arena the transitions of a plan need. No torch.

Tensors are cut up and put together one by one, which leaves gaps that the next one may not fit. But the transitions
of a job are always the same two: they are played through beforehand, on arenas of growing sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.weights.arena import Arena
from seesaw.weights.changes import CopyList
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
    acts = [
        _act(copy_list(spec, old, new, rank), DTYPE_BYTES[dtype])
        for old, new in ((None, first), (first, second), (second, first))
    ]
    sizes = [budget + budget * extra // _STEPS for extra in range(_MOST + 1)]
    return next((size for size in sizes if _suffices(Arena(size), acts)), sizes[-1])


@dataclass(frozen=True, slots=True)
class _Step:
    """A new tensor, and the old one that becomes it or is given up behind it."""

    name: str
    size: int
    source: str | None
    reuse: bool


@dataclass(frozen=True, slots=True)
class _Act:
    """A change of sharding in the order of `RankWeights`."""

    dropped: tuple[str, ...]
    steps: tuple[_Step, ...]


def _act(copies: CopyList, width: int) -> _Act:
    return _Act(
        tuple(tensor.name for tensor in copies.dropped),
        tuple(
            _Step(
                change.tensor.name,
                change.tensor.size * width,
                change.source.name if change.source else None,
                change.reuse,
            )
            for change in copies.steps()
        ),
    )


_Places = dict[str, tuple[int, int]]
"""Offset and bytes of tensors."""


def _suffices(arena: Arena, acts: Sequence[_Act]) -> bool:
    """Whether every tensor finds a place: of the first sharding, then of the second and the first in turn."""
    load, *turns = acts
    held = _played(arena, {}, load)
    seen = list[_Places]()
    for turn in range(_TURNS):
        if held is None or held in seen:
            break
        if turn % 2 == 0:
            seen.append(held)
        held = _played(arena, held, turns[turn % 2])
    return held is not None


def _played(arena: Arena, held: _Places, act: _Act) -> _Places | None:
    """Where the new tensors lie, or None if one finds no place."""
    for name in act.dropped:
        arena.give(*held[name])
    made: _Places = {}
    for step in act.steps:
        if step.reuse:
            assert step.source is not None
            made[step.name] = held[step.source]
            continue
        place = arena.take(step.size)
        if place is None:
            return None
        made[step.name] = place, step.size
        if step.source:
            arena.give(*held[step.source])
    return made
