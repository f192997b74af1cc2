"""The assignment of ranks is the best one, and the one that scipy would choose."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from seesaw.core.model_spec import ModelSpec
from seesaw.weights.assignment import Units, assign_ranks, greatest_sum, kept_elements
from seesaw.weights.footprint import Footprint
from tests.weights.shapes import moes, shardings, specs, usable


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("values", [1, 2, 4, 1000])
def test_the_greatest_sum_is_scipys(size: int, values: int) -> None:
    draw = random.Random(size * values)
    for _ in range(20):
        table = [[draw.randrange(values) for _ in range(size)] for _ in range(size)]
        _, columns = linear_sum_assignment(np.array(table), maximize=True)
        assert greatest_sum(table) == columns.tolist()


def test_the_greatest_sum_by_hand() -> None:
    assert greatest_sum([[1, 5], [4, 9]]) == [0, 1], "1 + 9 is more than 5 + 4"
    assert greatest_sum([[0, 0, 0]] * 3) == [0, 1, 2], "nothing to gain: everyone stays"
    assert greatest_sum([[7, 8, 0], [7, 0, 0], [0, 8, 7]]) == [1, 0, 2]


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_what_is_kept_is_what_is_not_fetched(spec: ModelSpec, data: st.DataObject) -> None:
    """Of quantised mixtures too: matrices of 8 bits, everything else of 16."""
    moe = data.draw(st.none() | moes(spec))
    world = data.draw(st.sampled_from([n for n in range(1, 9) if usable(spec, n, moe)]))
    old, new = (replace(data.draw(shardings(spec, world, moe)), ranks=tuple(range(world))) for _ in range(2))
    footprint = Footprint(spec, moe, matrix_bits=8.0, other_bits=16.0)
    kept = kept_elements(spec, old, new, moe, Units(1, 2))
    changes = footprint.changes(old, new)
    for place in range(min(old.layout.replica_ranks, new.layout.replica_ranks)):
        assert kept[place, place] == changes[place].after - changes[place].fetched
    chosen = assign_ranks(spec, old, new, moe, Units(1, 2))
    assert sorted(chosen.ranks) == list(range(world))
    least = sum(change.fetched for change in footprint.changes(old, chosen))
    assert least <= sum(change.fetched for change in changes)
