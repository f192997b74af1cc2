"""Real tensors: a transition gives what loading gives, its reverse undoes it, memory is as planned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.models.parameters import parameters
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import (
    Mode,
    Sharding,
    copy_list,
    device_tensors,
    make_sharding,
    plan_peak_bytes,
    weight_bytes,
)
from seesaw.weights.store import TORCH_DTYPES, HostWeightStore
from tests.weights.shapes import TINY, TINY_TIED, carrying, usable

MODES: tuple[Mode, ...] = ("resident", "delta", "reload")
SPECS = {"untied": TINY, "tied": TINY_TIED}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=4)
def store_of(spec: ModelSpec, dtype: DType = "float32") -> HostWeightStore:
    return HostWeightStore.dummy(spec, dtype, seed=3)


@cache
def loaded(spec: ModelSpec, sharding: Sharding, rank: int) -> dict[str, Tensor]:
    """The rank's tensors by plain indexing and stacking."""
    store = store_of(spec)
    return {
        tensor.name: torch.cat(
            [
                store.tensor(part.shard.parameter)[tuple(slice(*interval) for interval in part.shard.region)]
                for part in tensor.parts
            ]
        )
        for tensor in device_tensors(spec, sharding, rank)
    }


def assert_holds(weights: RankWeights, spec: ModelSpec, sharding: Sharding, rank: int) -> None:
    expected = loaded(spec, sharding, rank)
    assert list(weights.tensors) == list(expected)
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
    assert weights.sharding == sharding


def pairs(spec: ModelSpec, world: int) -> Iterator[tuple[Sharding, Sharding]]:
    for first, second in product(usable(spec, world), repeat=2):
        ranks = tuple(range(world))
        old = carrying(spec, make_sharding(spec, first))
        yield old, make_sharding(spec, second, head_weight=1.3, ranks=(*ranks[1:], 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_there_and_back(world: int, name: str, mode: Mode) -> None:
    spec = SPECS[name]
    for old, new in pairs(spec, world):
        for rank in range(world):
            weights = RankWeights(spec, store_of(spec), "float32", rank)
            weights.load(old)
            assert_holds(weights, spec, old, rank)
            there = weights.transition(new, mode)
            assert_holds(weights, spec, new, rank)
            copies = copy_list(spec, None if mode == "reload" else old, new, rank)
            assert there.bytes_fetched == copies.bytes_fetched("float32")
            assert there.bytes_kept == copies.bytes_kept("float32")
            assert there.bytes_fetched + there.bytes_kept == weight_bytes(spec, new, rank, "float32")
            assert weights.peak_bytes == plan_peak_bytes(
                spec, old, new, mode=mode, dtype="float32", rank=rank
            )
            back = weights.transition(old, mode)
            assert_holds(weights, spec, old, rank)
            if mode == "resident":
                assert back.bytes_fetched == 0
            else:
                assert weights.ledger.bytes == weight_bytes(spec, old, rank, "float32")


@pytest.mark.parametrize("mode", MODES)
def test_memory_follows_the_plan_step_by_step(mode: Mode) -> None:
    """Each transition of a chain reaches the peak planned for it alone."""
    spec, rank = TINY, 1
    chain = [make_sharding(spec, Layout.parse(text)) for text in ("P4", "T4", "P2T2", "D2P2", "D4", "T4")]
    weights = RankWeights(spec, store_of(spec), "bfloat16", rank)
    weights.load(chain[0])
    for old, new in pairwise(chain):
        if mode == "resident":
            weights.transition(old, "delta")  # forget the shardings before
        weights.ledger.peak_bytes = weights.ledger.bytes
        weights.transition(new, mode)
        assert weights.peak_bytes == plan_peak_bytes(spec, old, new, mode=mode, dtype="bfloat16", rank=rank)


def test_resident_shardings_stay_where_they_are() -> None:
    spec = TINY
    prefill, decode = (make_sharding(spec, Layout.parse(text)) for text in ("P2", "T2"))
    weights = RankWeights(spec, store_of(spec), "float32", 0)
    weights.load(prefill)
    first = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    weights.transition(decode, "resident")
    second = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    shared = "layers.0.input_norm.weight"
    assert first[shared] == second[shared], "equal tensors are held once"
    held = weights.ledger.bytes
    for _ in range(2):
        stats = weights.transition(prefill, "resident")
        assert {name: tensor.data_ptr() for name, tensor in weights.tensors.items()} == first
        assert (stats.bytes_fetched, stats.bytes_kept) == (0, weight_bytes(spec, prefill, 0, "float32"))
        weights.transition(decode, "resident")
        assert {name: tensor.data_ptr() for name, tensor in weights.tensors.items()} == second
    assert weights.ledger.bytes == weights.peak_bytes == held


def test_a_third_resident_sharding_replaces_the_one_not_in_use() -> None:
    spec = TINY
    one, two, three = (make_sharding(spec, Layout.parse(text)) for text in ("P4", "T4", "P2T2"))
    weights = RankWeights(spec, store_of(spec), "float32", 2)
    weights.load(one)
    weights.transition(two, "resident")
    weights.transition(three, "resident")
    assert_holds(weights, spec, three, 2)
    assert weights.transition(two, "resident").bytes_fetched == 0
    planned = plan_peak_bytes(spec, two, three, mode="resident", dtype="float32", rank=2)
    assert weights.ledger.bytes == planned
    assert weights.transition(one, "resident").bytes_fetched > 0
    assert_holds(weights, spec, one, 2)


@pytest.mark.parametrize("mode", ["delta", "reload"])
def test_other_modes_forget_the_resident_shardings(mode: Mode) -> None:
    spec = TINY
    one, two = (make_sharding(spec, Layout.parse(text)) for text in ("P4", "T4"))
    weights = RankWeights(spec, store_of(spec), "float32", 1)
    weights.load(one)
    weights.transition(two, "resident")
    weights.transition(two, mode)
    assert weights.ledger.bytes == weight_bytes(spec, two, 1, "float32")
    assert weights.transition(one, "resident").bytes_fetched > 0
    assert_holds(weights, spec, one, 1)


def test_gathered_shards_are_the_checkpoint() -> None:
    spec = TINY_TIED
    store = store_of(spec)
    for layout in usable(spec, 4):
        sharding = make_sharding(spec, layout)
        gathered = {p.name: torch.full(p.shape, torch.nan) for p in parameters(spec)}
        for rank in range(4):
            weights = RankWeights(spec, store, "float32", rank)
            weights.load(sharding)
            for tensor in device_tensors(spec, sharding, rank):
                for part in tensor.parts:
                    rows = part.shard.shape[0]
                    piece = weights.tensors[tensor.name][part.offset : part.offset + rows]
                    gathered[part.shard.parameter][tuple(slice(*i) for i in part.shard.region)] = piece
        assert all(torch.equal(gathered[p.name], store.tensor(p.name)) for p in parameters(spec))


@pytest.mark.parametrize(("stored", "compute"), list(product(DTYPE_BYTES, repeat=2)))
def test_copies_convert_to_the_compute_type(stored: DType, compute: DType) -> None:
    spec = TINY
    store = store_of(spec, stored)
    weights = RankWeights(spec, store, compute, 0)
    weights.load(make_sharding(spec, Layout.parse("P2")))
    weights.transition(make_sharding(spec, Layout.parse("T2")), "delta")
    down = weights.tensors["layers.1.down.weight"]
    assert down.dtype == TORCH_DTYPES[compute]
    original = store.tensor("model.layers.1.mlp.down_proj.weight")[:, :6]
    assert torch.equal(down, original.to(TORCH_DTYPES[compute]))
    assert all(tensor.dtype == TORCH_DTYPES[compute] for tensor in weights.tensors.values())


def test_the_ledger_counts_what_others_still_hold() -> None:
    spec = TINY
    sharding = make_sharding(spec, Layout())
    weights = RankWeights(spec, store_of(spec), "float32", 0)
    size = weight_bytes(spec, sharding, 0, "float32")
    kept = TINY.hidden * TINY.ffn * 4
    with torch.inference_mode():
        weights.load(sharding)
        view = weights.tensors["layers.0.down.weight"][1:]
        weights.load(sharding)
    assert (weights.ledger.bytes, weights.peak_bytes) == (size + kept, size + kept)
    del view
    assert weights.ledger.bytes == size


def test_a_rank_that_joins_loads_its_part() -> None:
    spec = TINY
    old = make_sharding(spec, Layout.parse("P2"), ranks=(0, 1))
    new = make_sharding(spec, Layout.parse("T2"), ranks=(0, 5))
    weights = RankWeights(spec, store_of(spec), "float32", 5)
    stats = weights.transition(new, "delta")
    assert stats.bytes_fetched == weight_bytes(spec, new, 5, "float32")
    assert plan_peak_bytes(spec, old, new, mode="delta", dtype="float32", rank=5) == weights.peak_bytes
    assert_holds(weights, spec, new, 5)
