"""What a check carries out follows from the layouts of the plan."""

from __future__ import annotations

import pytest

from seesaw.core.layout import Layout
from seesaw.preflight.messages import MEET, PLACE, Step
from seesaw.preflight.program import LARGE, MIDDLE, SMALL, describe, groups_of, steps_of
from seesaw.weights.sharding import make_sharding
from tests.weights.shapes import spec_of

SPEC = spec_of(layers=8, heads=8, kv_heads=4, ffn=64)


def steps(*layouts: str) -> list[Step]:
    return steps_of(SPEC, [make_sharding(SPEC, Layout.parse(layout)) for layout in layouts])


def links(found: list[Step]) -> set[tuple[tuple[int, ...], int]]:
    return {(step.members, step.channel) for step in found if step.operation == "send"}


def test_both_layouts_are_covered() -> None:
    found = steps("P4", "T4")
    assert groups_of(found) == [(0, 1, 2, 3)]
    assert links(found) == {((0, 1), 0), ((1, 2), 0), ((2, 3), 0), ((3, 0), 1)}
    for operation in ("all_reduce", "gather", "broadcast"):
        sizes = {step.bytes for step in found if step.operation == operation}
        assert sizes == {SMALL, MIDDLE, LARGE}
    assert found[0] == found[-1] == Step("barrier", (0, 1, 2, 3), 8)


def test_groups_and_links_of_a_mixed_layout() -> None:
    found = steps("D2P2T2", "D4P2")
    assert {(0, 1), (2, 3), (4, 5), (6, 7)} <= set(groups_of(found))
    tensor = [step.members for step in found if step.operation == "all_reduce" and step.bytes == LARGE]
    assert sorted(tensor) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    # of each replica: hidden states by tensor-parallel index, tokens to every rank of the first stage
    assert {((0, 2), 0), ((1, 3), 0), ((2, 0), 1), ((2, 1), 1)} <= links(found)
    assert ((4, 5), 0) in links(found) and ((5, 4), 1) in links(found)  # of D4P2


def test_ranks_that_never_talk_only_meet() -> None:
    assert {step.operation for step in steps("D4")} == {"barrier"}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (PLACE, "the way to the ranks' places"),
        (MEET, "the meeting of the ranks"),
        (0, "barrier among ranks 0, 1"),
        (1, "all_reduce of 64 bytes among ranks 0, 1"),
        (2, "message of 40 KiB from rank 1 to rank 0"),
        (3, "the end"),
    ],
)
def test_steps_in_words(number: int, words: str) -> None:
    program = [Step("barrier", (0, 1), 8), Step("all_reduce", (0, 1), SMALL), Step("send", (1, 0), MIDDLE, 1)]
    assert describe(program, number) == words
