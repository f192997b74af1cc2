"""Copies between device pools and the host buffer, under every pair of shardings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.kv.device_pool import DevicePool
from seesaw.kv.host_buffer import HostBuffer
from seesaw.kv.transfers import swap_in, swap_out
from seesaw.weights.sharding import RankView, Sharding, make_sharding, rank_view

BLOCK_SIZE, HEAD_DIM, LAYERS = 4, 8, 7
DEVICE_BLOCKS, HOST_BLOCKS = 5, 6
TENSOR_DEGREES, STAGES = (1, 2, 3, 4, 8), (1, 2, 3, 4)
Pairs = Sequence[tuple[int, int]]


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("SEESAW_NATIVE", "0")


def spec(kv_heads: int) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=LAYERS,
        hidden=64,
        heads=16,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        ffn=64,
        vocab=64,
        max_position=64,
        rms_eps=1e-5,
        rope=RopeSpec(),
    )


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.view(torch.int16)


def host_buffer(kv_heads: int) -> Tensor:
    return HostBuffer.create(HOST_BLOCKS, LAYERS, kv_heads, BLOCK_SIZE, HEAD_DIM, torch.bfloat16).tensor


def random_kv(kv_heads: int, blocks: int = HOST_BLOCKS) -> Tensor:
    kv = torch.empty(blocks, LAYERS, 2, kv_heads, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    bits(kv).random_(-(1 << 15), 1 << 15)
    return kv


def part(kv: Tensor, view: RankView) -> Tensor:
    """What of `[blocks, layers, 2, kv_heads, …]` a rank holds."""
    layers, heads = view.layers, view.kv_heads
    return kv[:, layers.start : layers.stop, :, heads.start : heads.stop]


def pool_of(view: RankView) -> Tensor:
    size = LAYERS * 2 * 8 * BLOCK_SIZE * HEAD_DIM * DEVICE_BLOCKS * 2
    shape = (DEVICE_BLOCKS, len(view.layers), len(view.kv_heads), BLOCK_SIZE, HEAD_DIM)
    return DevicePool(size).view(*shape, torch.bfloat16)


def uneven_sharding(model: ModelSpec, pp: int, tp: int, chance: random.Random) -> Sharding:
    """Stages of random sizes, ranks in random places."""
    cuts = [0, *sorted(chance.sample(range(1, LAYERS), pp - 1)), LAYERS]
    ranks = chance.sample(range(pp * tp), pp * tp)
    stages = tuple(range(a, b) for a, b in itertools.pairwise(cuts))
    return make_sharding(model, Layout(pp=pp, tp=tp), stages=stages, ranks=tuple(ranks))


def views(model: ModelSpec, sharding: Sharding) -> list[RankView]:
    return [rank_view(model, sharding, rank) for rank in sharding.ranks]


def write(kv: Tensor, pairs: Pairs, ranks: list[RankView], chance: random.Random) -> Tensor:
    """A host buffer into which ranks have swapped out `kv` (by device block), whole or layer by layer."""
    host = host_buffer(kv.shape[3])
    for view in ranks:
        pool = pool_of(view)
        pool.copy_(part(kv, view))
        if not view.owns_kv:
            continue
        each: list[int | None] = list(view.layers) if chance.random() < 0.5 else [None]
        copied = sum(
            swap_out(pool, host, pairs, layers=view.layers, kv_heads=view.kv_heads, layer=layer)
            for layer in each
        )
        assert copied == len(pairs) * pool[0].numel() * 2
    return host


def check_read(host: Tensor, pairs: Pairs, ranks: list[RankView], chance: random.Random) -> None:
    """Every rank, replicas included, swaps in exactly its part, and no other device block changes."""
    for view in ranks:
        pool = pool_of(view)
        bits(pool).fill_(77)
        each: list[int | None] = list(view.layers) if chance.random() < 0.5 else [None]
        for layer in each:
            swap_in(pool, host, pairs, layers=view.layers, kv_heads=view.kv_heads, layer=layer)
        expected = torch.full_like(bits(pool), 77)
        for device, block in pairs:
            expected[device] = bits(part(host, view)[block])
        assert torch.equal(bits(pool), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_written_under_one_sharding_and_read_under_any_other(kv_heads: int) -> None:
    model, chance = spec(kv_heads), random.Random(kv_heads)
    torch.manual_seed(kv_heads)
    out_pairs = [(0, 4), (3, 0), (4, 5)]
    in_pairs = [(2, 5), (4, 4), (1, 0)]
    kv = random_kv(kv_heads, DEVICE_BLOCKS)
    expected = torch.zeros_like(bits(host_buffer(kv_heads)))
    for device, block in out_pairs:
        expected[block] = bits(kv[device])
    shardings = [uneven_sharding(model, pp, tp, chance) for pp in STAGES for tp in TENSOR_DEGREES]
    for source in shardings:
        host = write(kv, out_pairs, views(model, source), chance)
        assert torch.equal(bits(host), expected), source
    # every writer left the same bits, so one buffer stands for all of them
    for target in shardings:
        check_read(host, in_pairs, views(model, target), chance)


def test_one_layer_leaves_the_others_alone() -> None:
    model = spec(4)
    view = rank_view(model, make_sharding(model, Layout(pp=2, tp=2)), 3)
    pool, host = pool_of(view), host_buffer(4)
    bits(pool).fill_(5)
    layer = view.layers[1]
    swap_out(pool, host, [(1, 2)], layers=view.layers, kv_heads=view.kv_heads, layer=layer)
    expected = torch.zeros_like(bits(host))
    expected[2, layer, :, view.kv_heads.start : view.kv_heads.stop] = 5
    assert torch.equal(bits(host), expected)


def test_pairs_as_tensor_or_none() -> None:
    whole, heads = range(LAYERS), range(2)
    kv, host = random_kv(2, DEVICE_BLOCKS), host_buffer(2)
    assert swap_out(kv, host, [], layers=whole, kv_heads=heads) == 0
    table = torch.tensor([[1, 3], [0, 2]])
    assert swap_out(kv, host, table, layers=whole, kv_heads=heads) == 2 * kv[0].numel() * 2
    assert torch.equal(bits(host[[3, 2]]), bits(kv[[1, 0]]))


@pytest.mark.parametrize("pair", [(DEVICE_BLOCKS, 0), (0, HOST_BLOCKS), (-1, 0), (0, -1)])
def test_blocks_outside_are_refused(pair: tuple[int, int]) -> None:
    kv, host = random_kv(2, DEVICE_BLOCKS), host_buffer(2)
    for copy in (swap_out, swap_in):
        with pytest.raises(AssertionError):
            copy(kv, host, [(0, 0), pair], layers=range(LAYERS), kv_heads=range(2))
    assert not bits(host).any()


def test_ranges_must_be_those_of_the_pool() -> None:
    kv, host = random_kv(2, DEVICE_BLOCKS), host_buffer(4)
    for layers, heads in (
        (range(1, LAYERS + 1), range(2)),
        (range(LAYERS), range(3, 5)),
        (range(2), range(2)),
    ):
        with pytest.raises(AssertionError):
            swap_out(kv, host, [(0, 0)], layers=layers, kv_heads=heads)
