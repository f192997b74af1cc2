"""Where weights lie on a CPU rank: nothing overlaps, everything comes back, and there is little waste."""

from __future__ import annotations

import gc
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from seesaw.bench.shapes import SHAPES, write_config
from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.models.hf_config import load_spec
from seesaw.weights.arena import Arena
from seesaw.weights.memory import HostArena
from seesaw.weights.rehearsal import arena_bytes
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import Sharding, copy_list, make_sharding, plan_peak_bytes
from tests.weights.shapes import TINY
from tests.weights.test_reshard import MODES, Mode, assert_holds, store_of

PAIRS = ("P2 T2", "D2 T2", "P4 T4", "P2T2 T4", "P4 P2T2", "D2P2 T4", "P4 D2T2", "P8 P2T4", "D2P4 P2T4")


def test_pieces_never_overlap_and_the_whole_comes_back() -> None:
    rng, arena = random.Random(1), Arena(1 << 20)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(20_000):
        if held and rng.random() < 0.4:
            offset = rng.choice(list(held))
            arena.give(offset, held.pop(offset))
        else:
            size = rng.choice((1, 64, 65, 1000, rng.randrange(1, 100_000)))
            offset = arena.take(size)
            if offset is None:
                refused += 1
                continue
            assert offset % 64 == 0
            held[offset] = size
        ends = [(offset, offset + -(-size // 64) * 64) for offset, size in sorted(held.items())]
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
        assert not ends or (ends[0][0] >= 0 and ends[-1][1] <= arena.size)
        assert arena.free == arena.size - sum(end - begin for begin, end in ends)
    assert refused > 100
    for offset, size in held.items():
        arena.give(offset, size)
    assert arena.take(arena.size) == 0


def test_it_takes_the_smallest_gap_and_lays_what_is_large_at_an_end() -> None:
    arena = Arena(6400)
    places = [arena.take(64) for _ in range(4)]
    assert places == [0, 64, 128, 192]
    assert arena.take(640) == 6400 - 640
    arena.give(64, 64)
    assert arena.take(128) == 256
    assert arena.take(60) == 64
    assert arena.take(6400) is None


def test_what_is_not_taken_cannot_be_given_back() -> None:
    arena = Arena(640)
    offset = arena.take(64)
    assert offset == 576  # a tenth of it
    arena.give(offset, 64)
    with pytest.raises(AssertionError):
        arena.give(offset, 64)


def model(name: str, tmp_path: Path) -> ModelSpec:
    write_config(tmp_path, SHAPES[name])
    return load_spec(tmp_path)


@pytest.mark.parametrize("name", ["270m", "1.1b"])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_was_rehearsed_holds_all_transitions(name: str, pair: str, tmp_path: Path) -> None:
    """Played by the real copy lists, more often than in the rehearsal; a tenth more than the tensors, mostly."""
    spec = model(name, tmp_path)
    layouts = [Layout.parse(text) for text in pair.split()]
    first, second = (make_sharding(spec, layout) for layout in layouts)
    for rank in (0, layouts[0].world // 2, layouts[0].world - 1):
        for pair_of in ((first, second), (second, first)):
            peak = max(
                plan_peak_bytes(spec, *way, mode="delta", dtype="bfloat16", rank=rank)
                for way in (pair_of, pair_of[::-1])
            )
            size = arena_bytes(spec, pair_of, rank, "bfloat16", peak)
            assert peak <= size <= 1.26 * peak, rank
            assert play(Arena(size), spec, pair_of, rank), rank
            if size > peak:
                assert not play(Arena(size - peak // 32 - 64), spec, pair_of, rank), "the least of all sizes"


def play(arena: Arena, spec: ModelSpec, pair: tuple[Sharding, Sharding], rank: int) -> bool:
    """Forty `delta` transitions, tensor by tensor; whether each found a place."""
    old: Sharding | None = None
    held: dict[str, tuple[int, int]] = {}
    for turn in range(41):
        copies = copy_list(spec, old, pair[turn % 2], rank)
        for tensor in copies.dropped:
            arena.give(*held.pop(tensor.name))
        made = {}
        for change in copies.steps():
            if change.reuse:
                assert change.source is not None
                made[change.tensor.name] = held.pop(change.source.name)
                continue
            size = change.tensor.size * DTYPE_BYTES["bfloat16"]
            place = arena.take(size)
            if place is None:
                return False
            made[change.tensor.name] = place, size
            if change.source:
                arena.give(*held.pop(change.source.name))
        assert not held, "every old tensor was let go"
        old, held = pair[turn % 2], made
    return True


def test_where_no_size_is_enough_the_largest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (make_sharding(TINY, Layout.parse(text)) for text in ("P4", "D2T2"))
    peak = plan_peak_bytes(TINY, first, second, mode="delta", dtype="bfloat16", rank=1)
    monkeypatch.setattr(Arena, "take", lambda self, size: None)
    assert arena_bytes(TINY, (first, second), 1, "bfloat16", peak) == peak + peak * 10 // 32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_weights_lie_in_the_arena_and_elsewhere_what_does_not_fit(mode: Mode, share: float) -> None:
    first, second = (make_sharding(TINY, Layout.parse(text)) for text in ("P4", "D2T2"))
    peak = plan_peak_bytes(TINY, first, second, mode=mode, dtype="float32", rank=1)
    arena = HostArena(int(peak * share * (9 / 8 if mode == "delta" else 1)))
    everything = arena.free
    weights = RankWeights(TINY, store_of(TINY), "float32", 1, arena=arena)
    weights.load(first)
    for cycle in range(6):
        assert_holds(weights, TINY, (first, second)[cycle % 2], 1)
        weights.transition((second, first)[cycle % 2], mode)
    assert weights.peak_bytes == peak
    taken = everything - arena.free
    assert taken > 0
    if share == 1.0 and mode != "delta":
        assert taken >= weights.ledger.bytes  # rounded up, tensor by tensor
    weights.tensors.clear()
    weights._resident.clear()
    assert arena.free == everything and weights.ledger.bytes == 0


def test_memory_that_somebody_still_looks_at_is_not_used_again() -> None:
    first, second = (make_sharding(TINY, Layout.parse(text)) for text in ("P2", "T2"))
    arena = HostArena(64 << 20)
    weights = RankWeights(TINY, store_of(TINY), "float32", 0, arena=arena)
    weights.load(first)
    name, kept = next((name, tensor) for name, tensor in weights.tensors.items() if "down" in name)
    view, was = kept[:1], kept[:1].clone()
    del kept
    for _ in range(3):
        weights.transition(second, "delta")
        weights.transition(first, "delta")
    assert torch.equal(view, was), name
    held = arena.free
    del view
    gc.collect()
    assert arena.free > held
