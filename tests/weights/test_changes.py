"""Copy lists are right and minimal, rank assignment is optimal, the order of steps needs least memory."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.models.parameters import parameters
from seesaw.weights.assignment import assign_ranks, kept_elements
from seesaw.weights.changes import CopyList, TensorChange, copy_list_between, peak_elements
from seesaw.weights.sharding import (
    DeviceTensor,
    Interval,
    Mode,
    Part,
    Region,
    Shard,
    Sharding,
    copy_list,
    device_tensors,
    head_weight_in_layers,
    make_sharding,
    plan_peak_bytes,
    weight_bytes,
)
from tests.weights.shapes import AWKWARD, TINY, TINY_TIED, carrying, shardings, specs, usable

Ids = NDArray[np.int64]


@lru_cache(maxsize=64)
def element_ids(spec: ModelSpec) -> dict[str, Ids]:
    """Every element of the checkpoint by a number of its own."""
    ids, start = {}, 0
    for parameter in parameters(spec):
        ids[parameter.name] = np.arange(start, start + parameter.size).reshape(parameter.shape)
        start += parameter.size
    return ids


def box(region: Region) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in region)


@cache
def held_ids(spec: ModelSpec, sharding: Sharding, rank: int) -> dict[str, Ids]:
    """The device tensors of a rank, holding element numbers."""
    whole = element_ids(spec)
    return {
        tensor.name: np.concatenate([whole[p.shard.parameter][box(p.shard.region)] for p in tensor.parts])
        for tensor in device_tensors(spec, sharding, rank)
    }


def everything(tensors: dict[str, Ids]) -> Ids:
    return np.concatenate([ids.ravel() for ids in tensors.values()] or [np.empty(0, np.int64)])


def assert_exact_and_minimal(spec: ModelSpec, old: Sharding | None, new: Sharding, rank: int) -> None:
    before = held_ids(spec, old, rank) if old else {}
    after = held_ids(spec, new, rank)
    copies = copy_list(spec, old, new, rank)
    fetched: list[Ids] = []
    made: dict[str, Ids] = {}
    for change in copies.changes:
        if change.reuse:
            assert change.source and not change.keep and not change.fetch
            made[change.tensor.name] = before[change.source.name]
            continue
        target = made[change.tensor.name] = np.full(change.tensor.shape, -1)
        written = 0
        for keep in change.keep:
            target[box(keep.target)] = before[keep.source][box(keep.origin)]
            written += target[box(keep.target)].size
        for fetch in change.fetch:
            piece = element_ids(spec)[fetch.parameter][box(fetch.origin)]
            target[box(fetch.target)] = piece
            written += piece.size
            fetched.append(piece.ravel())
        assert written == target.size, "each element is written once"
    assert made.keys() == after.keys()
    assert all(np.array_equal(made[name], ids) for name, ids in after.items())
    moved = np.sort(np.concatenate(fetched)) if fetched else np.empty(0, np.int64)
    missing = np.setdiff1d(everything(after), everything(before))
    assert np.array_equal(moved, missing), "fetched is exactly what was not held"
    assert copies.bytes_fetched("float32") == 4 * missing.size
    assert copies.bytes_kept("bfloat16") == 2 * (everything(after).size - missing.size)
    used = {change.source.name for change in copies.changes if change.source}
    assert {tensor.name for tensor in copies.dropped} == before.keys() - used


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("spec", [TINY, TINY_TIED], ids=["untied", "tied"])
def test_copy_lists_are_exact_and_minimal(spec: ModelSpec, world: int) -> None:
    prefill = [make_sharding(spec, layout) for layout in usable(spec, world)]
    prefill += [carrying(spec, sharding) for sharding in prefill if sharding.layout.pp > 1]
    decode = [
        make_sharding(spec, layout, head_weight=2.3, ranks=tuple(range(world))[::-1])
        for layout in usable(spec, world)
    ]
    for old in prefill:
        for new in decode:
            for rank in range(world):
                assert_exact_and_minimal(spec, old, new, rank)
    for new in prefill:
        assert_exact_and_minimal(spec, None, new, 0)
        assert_exact_and_minimal(spec, new, new, world - 1)
        assert copy_list(spec, new, new, 0).bytes_fetched("float32") == 0


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_copy_lists_of_random_models(spec: ModelSpec, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([n for n in range(1, 13) if usable(spec, n)]))
    old, new = (data.draw(shardings(spec, world)) for _ in range(2))
    assert_exact_and_minimal(spec, old, new, data.draw(st.sampled_from(range(world))))


def test_equal_tensors_stay_where_they_are() -> None:
    old, new = (make_sharding(TINY_TIED, Layout.parse(text)) for text in ("T2", "P2"))
    names = {change.tensor.name for change in copy_list(TINY_TIED, old, new, 0).changes if change.reuse}
    assert "layers.0.input_norm.weight" in names and "layers.0.qkv.weight" not in names
    moved = make_sharding(TINY_TIED, Layout.parse("P2"), ranks=(1, 0))
    head = next(c for c in copy_list(TINY_TIED, new, moved, 0).changes if c.tensor.name == "head.weight")
    assert head.reuse and head.source and head.source.name == "embed.weight", (
        "the tied embedding becomes the head"
    )


def total_kept(spec: ModelSpec, old: Sharding, new: Sharding) -> int:
    return sum(
        copy_list(spec, old, new, rank).bytes_kept("float16") // 2 for rank in new.ranks if rank in old.ranks
    )


@pytest.mark.parametrize("name", AWKWARD)
def test_kept_elements_agree_with_the_copy_lists(name: str) -> None:
    spec = AWKWARD[name]
    for world in (2, 4, 6):
        for first in usable(spec, world):
            for second in usable(spec, world):
                old = carrying(spec, make_sharding(spec, first))
                new = make_sharding(spec, second, head_weight=1.7)
                kept = kept_elements(spec, old, new)
                for place in range(min(first.replica_ranks, second.replica_ranks)):
                    assert kept[place, place] * 2 == copy_list(spec, old, new, place).bytes_kept("float16")


def kept_by_place(spec: ModelSpec, old: Sharding, new: Sharding) -> dict[int, list[int]]:
    """Elements that each rank keeps in each place of `new`, from real copy lists."""
    places = [device_tensors(spec, new, rank) for rank in new.ranks]
    return {
        rank: [
            copy_list_between(device_tensors(spec, old, rank), place).bytes_kept("float16")
            for place in places
        ]
        for rank in old.ranks
    }


@pytest.mark.parametrize("spec", [TINY, TINY_TIED], ids=["untied", "tied"])
def test_assignment_is_optimal_up_to_four_ranks(spec: ModelSpec) -> None:
    for world in (2, 3, 4):
        for first in usable(spec, world):
            old = make_sharding(spec, first, ranks=tuple(range(world))[::-1])
            for second in usable(spec, world):
                new = make_sharding(spec, second, head_weight=head_weight_in_layers(spec))
                chosen = assign_ranks(spec, old, new)
                assert (chosen.layout, chosen.stages) == (new.layout, new.stages)
                kept = kept_by_place(spec, old, new)
                value = {
                    ranks: sum(kept[rank][place] for place, rank in enumerate(ranks))
                    for ranks in permutations(range(world))
                }
                best = max(value.values())
                assert value[chosen.ranks] == best
                most = max(staying(ranks, new.ranks) for ranks in value if value[ranks] == best)
                assert staying(chosen.ranks, new.ranks) == most, "ties are broken toward staying"


def staying(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_assignment_never_moves_more_than_identity(spec: ModelSpec, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([n for n in range(1, 17) if usable(spec, n)]))
    old, new = (data.draw(shardings(spec, world)) for _ in range(2))
    chosen = assign_ranks(spec, old, new)
    assert chosen == assign_ranks(spec, old, new)
    assert total_kept(spec, old, chosen) >= total_kept(spec, old, new)
    again = assign_ranks(spec, old, old)
    assert again == old, "an unchanged sharding stays"


def test_assignment_with_ranks_that_left_and_came() -> None:
    old = make_sharding(TINY, Layout.parse("P4"), ranks=(0, 1, 2, 3))
    new = make_sharding(TINY, Layout.parse("P2"), ranks=(1, 9))
    chosen = assign_ranks(TINY, old, new)
    assert chosen.ranks == (1, 9), "rank 1 had layers of the first half"
    other = assign_ranks(TINY, old, make_sharding(TINY, Layout.parse("P2"), ranks=(3, 9)))
    assert other.ranks == (9, 3), "rank 3 had layers of the second half"
    assert plan_peak_bytes(TINY, old, chosen, mode="delta", dtype="float32", rank=9) == weight_bytes(
        TINY, chosen, 9, "float32"
    )


def vector(name: str, parameter: str, start: int, stop: int) -> DeviceTensor:
    return DeviceTensor(name, (stop - start,), (Part(Shard(parameter, (Interval(start, stop),)), 0),))


def peak_of(order: tuple[TensorChange, ...], copies: CopyList, held: int) -> int:
    """The peak when the changes are done in `order`, by plain bookkeeping."""
    level = held - sum(tensor.size for tensor in copies.dropped)
    peak = max(held, level)
    for change in order:
        if change.reuse:
            continue
        level += change.tensor.size
        peak = max(peak, level)
        level -= change.source.size if change.source else 0
    return peak


@settings(max_examples=150, deadline=None)
@given(ranges=st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=5))
def test_no_order_of_steps_needs_less_memory(ranges: list[tuple[int, int, int, int]]) -> None:
    old = tuple(vector(f"t{i}", f"p{i}", a, a + n) for i, (a, n, _, _) in enumerate(ranges) if n)
    new = tuple(vector(f"t{i}", f"p{i}", b, b + m) for i, (_, _, b, m) in enumerate(ranges) if m)
    copies = copy_list_between(old, new)
    held = sum(tensor.size for tensor in old)
    best = min(peak_of(order, copies, held) for order in permutations(copies.changes))
    assert peak_elements(old, new, "delta") == peak_of(copies.steps(), copies, held) == best


@pytest.mark.parametrize("name", AWKWARD)
def test_delta_peak_is_within_one_tensor_of_the_larger_sharding(name: str) -> None:
    spec = AWKWARD[name]
    size = DTYPE_BYTES["bfloat16"]
    for first in usable(spec, 4):
        for second in usable(spec, 4):
            old, new = make_sharding(spec, first), make_sharding(spec, second)
            for rank in range(4):
                ends = [weight_bytes(spec, s, rank, "bfloat16") for s in (old, new)]
                largest = max(t.size * size for s in (old, new) for t in device_tensors(spec, s, rank))
                peaks = {mode: peak(spec, old, new, mode, rank) for mode in ("resident", "delta", "reload")}
                assert max(ends) <= peaks["delta"] < max(ends) + largest
                assert peaks["reload"] == max(ends)
                assert peaks["delta"] <= peaks["resident"] <= sum(ends)


def peak(spec: ModelSpec, old: Sharding, new: Sharding, mode: Mode, rank: int) -> int:
    return plan_peak_bytes(spec, old, new, mode=mode, dtype="bfloat16", rank=rank)
