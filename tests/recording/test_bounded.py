"""Histories that stay small however long a job is, and lose nothing that adds up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seesaw.recording.bounded import Lengths, Phases, Thinned, bucket, bucket_width

NAMES = st.sampled_from(["prefill", "decode", "transition"])


@given(st.lists(st.tuples(st.floats(1e-4, 100), NAMES), max_size=300), st.integers(3, 40))
def test_phases_tile_the_time(parts: list[tuple[float, str]], most: int) -> None:
    phases, at = Phases(most), 0.0
    for seconds, name in parts:
        phases.add(at, seconds, name)
        at += seconds
    assert len(phases.spans) <= most
    reached = 0.0
    for span in phases.spans:
        assert abs(span.start - reached) < 1e-6
        reached = span.start + span.seconds
    assert abs(reached - at) < 1e-6


def test_few_phases_are_kept_as_they_were() -> None:
    phases = Phases()
    for at, name in enumerate(["prefill", "prefill", "decode", "prefill"]):
        phases.add(at, 1.0, name)
    assert [(s.start, s.seconds, s.phase) for s in phases.spans] == [
        (0, 2, "prefill"),
        (2, 1, "decode"),
        (3, 1, "prefill"),
    ]


def test_a_gap_is_no_part_of_a_phase() -> None:
    phases = Phases()
    phases.add(0.0, 1.0, "decode")
    phases.add(5.0, 1.0, "decode")
    assert [s.start for s in phases.spans] == [0.0, 5.0]


def test_short_phases_are_taken_together_under_the_longest() -> None:
    phases = Phases(4)
    at = 0.0
    for _ in range(10):
        for seconds, name in ((0.1, "prefill"), (0.9, "decode")):
            phases.add(at, seconds, name)
            at += seconds
    assert len(phases.spans) <= 4
    assert phases.spans[0].phase == "decode"


@given(st.integers(0, 500), st.integers(2, 20))
def test_thinned_items_are_evenly_spread(count: int, most: int) -> None:
    thinned: Thinned[int] = Thinned(most)
    for i in range(count):
        thinned.add(i)
    assert len(thinned.items) <= most
    assert thinned.items == list(range(0, count, thinned.every))


@given(st.integers(0, 1 << 20))
def test_a_bucket_holds_its_lengths(length: int) -> None:
    least = bucket(length)
    assert least <= length < least + bucket_width(length)
    assert bucket(least) == least and bucket_width(least) == bucket_width(length)
    assert bucket_width(length) <= max(1, length / 16)


def test_lengths_are_counted_and_sampled() -> None:
    lengths = Lengths(sample=50)
    for i in range(1000):
        lengths.add(100 + i, i % 7)
    assert sum(lengths.prompts.values()) == sum(lengths.outputs.values()) == 1000
    assert lengths.outputs == {i: 143 if i < 6 else 142 for i in range(7)}
    assert len(lengths.sample) == 50
    assert 400 < sum(prompt for prompt, _ in lengths.sample) / 50 - 100 < 600
    assert len(lengths.prompts) < 100
