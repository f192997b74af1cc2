"""Pipeline stages of layers that weigh differently."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.errors import LayoutError
from seesaw.weights.stages import divide_layers, split_layers, split_stages
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


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(st.sampled_from([(1.0, 0.0), (2.5, 2.0), (7.0, 3.0)]), min_size=1, max_size=5),
    head=st.sampled_from([-0.875, 0.0, 3.0]),
    most=st.sampled_from([1.25, 2.0, inf]),
    data=st.data(),
)
def test_no_division_of_layers_and_ffns_is_lighter(
    layers: list[tuple[float, float]], head: float, most: float, data: st.DataObject
) -> None:
    # all numbers are sums of powers of two down to a sixteenth: what just fits does so however it is added up
    weights, ffns = tuple(w for w, _ in layers), tuple(f for _, f in layers)
    pp, columns, grain = data.draw(st.integers(1, len(layers))), 16, 5
    cuts = [(start, 0) for start in range(1, len(layers))]
    cuts += [(start, carried) for start in range(1, len(layers)) if ffns[start - 1] for carried in (5, 10)]

    def loads(chosen: list[tuple[int, int]]) -> list[float]:
        ends = [0.0]
        ends += [sum(weights[:start]) - ffns[start - 1] * c / columns for start, c in chosen]
        return [b - a for a, b in pairwise([*ends, sum(weights) + head * weights[-1]])]

    def of_last(chosen: list[tuple[int, int]]) -> float:
        return loads(chosen)[-1] - head * weights[-1]

    most *= weights[-1] if pp > 1 else inf
    every = [
        sorted(chosen)
        for chosen in combinations(cuts, pp - 1)
        if len({start for start, _ in chosen}) == len(chosen) and of_last(sorted(chosen)) <= most
    ]
    division = divide_layers(weights, ffns, pp, head, columns, grain, most)
    starts = [stage.start for stage in division.stages]
    assert [layer for stage in division.stages for layer in stage] == list(range(len(layers)))
    assert len(starts) == pp and all(division.stages) and division.carried[0] == 0
    chosen = list(zip(starts, division.carried, strict=True))[1:]
    assert set(chosen) <= set(cuts)
    lightest = min(max(loads(one)) for one in every)
    assert max(loads(chosen)) == pytest.approx(lightest)
    assert of_last(chosen) <= most


def test_an_ffn_is_shared_by_hand() -> None:
    # Three layers of 4, three quarters of it FFN, on two stages of 6: half of the second layer, 8 of 12 columns.
    halves = divide_layers((4.0,) * 3, (3.0,) * 3, 2, 0.0, 12, 1)
    assert halves == ((range(2), range(2, 3)), (0, 8))
    assert divide_layers((4.0,) * 3, (3.0,) * 3, 2, 0.0, 12, 5) == ((range(2), range(2, 3)), (0, 5))
    # Nothing of the last layer goes anywhere else, and every stage has the attention of a layer.
    assert divide_layers((1.0, 9.0), (0.5, 8.0), 2, 0.0, 8, 1) == ((range(1), range(1, 2)), (0, 0))
    assert divide_layers((9.0, 1.0, 1.0), (0.0,) * 3, 3, 0.0, 8, 1) == (
        (range(1), range(1, 2), range(2, 3)),
        (0, 0, 0),
    )


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
