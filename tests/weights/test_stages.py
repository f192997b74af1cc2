"""Pipeline stages of layers that weigh differently."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.errors import LayoutError
from seesaw.weights.stages import split_layers, split_stages
from tests.weights.shapes import spec_of


def burdens(weights: tuple[float, ...], stages: tuple[range, ...], head: float) -> list[float]:
    loads = [sum(weights[layer] for layer in stage) for stage in stages]
    loads[-1] += head * weights[-1]
    return loads


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=1, max_size=8).map(tuple),
    head=st.sampled_from([-0.9, -0.3, 0.0, 0.4, 3.0]),
    data=st.data(),
)
def test_no_division_has_a_lighter_heaviest_stage(
    weights: tuple[float, ...], head: float, data: st.DataObject
) -> None:
    pp = data.draw(st.integers(1, len(weights)))
    stages = split_layers(weights, pp, head)
    assert [layer for stage in stages for layer in stage] == list(range(len(weights)))
    assert len(stages) == pp and all(stages)
    every = [
        burdens(weights, tuple(map(range, (0, *cuts), (*cuts, len(weights)))), head)
        for cuts in combinations(range(1, len(weights)), pp - 1)
    ]
    chosen = burdens(weights, stages, head)
    lightest = min(map(max, every))
    assert max(chosen) == pytest.approx(lightest)
    even = min(sum(x * x for x in loads) for loads in every if max(loads) <= lightest * (1 + 1e-9))
    if len(set(weights)) > 1:
        assert sum(x * x for x in chosen) == pytest.approx(even), "the most even of them"


@pytest.mark.parametrize("head", [-0.9, 0.0, 1.3])
def test_equal_layers_are_divided_by_their_number(head: float) -> None:
    for pp in range(1, 8):
        assert split_layers((3.0,) * 7, pp, head) == split_stages(spec_of(layers=7), pp, head)


def test_by_hand() -> None:
    # Three light layers stand in front of three that weigh four times as much.
    assert split_layers((1.0, 1.0, 1.0, 4.0, 4.0, 4.0), 3, 0.0) == (range(4), range(4, 5), range(5, 6))
    # A head that weighs a whole heavy layer fills the last stage.
    assert split_layers((1.0, 1.0, 1.0, 4.0, 4.0, 4.0), 3, 1.0) == (range(4), range(4, 5), range(5, 6))
    assert split_layers((4.0, 4.0, 1.0, 1.0, 1.0, 1.0), 2, 0.0) == (range(1), range(1, 6))


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(LayoutError, match="P3: 3 pipeline stages need 3 layers, the model has 2"):
        split_layers((1.0, 2.0), 3, 0.0)
