"""Bytes by kinds of layers are those of the tensors, one by one."""

from __future__ import annotations

from itertools import combinations
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.models.parameters import Parameter, edge_parameters, layer_parameters
from seesaw.weights.changes import copy_list_between
from seesaw.weights.footprint import Change, Footprint
from seesaw.weights.intervals import DeviceTensor, region_size
from seesaw.weights.sharding import (
    Sharding,
    copy_list,
    device_tensors,
    make_sharding,
    plan_peak_bytes,
    weight_bytes,
)
from tests.weights.shapes import AWKWARD, carrying, moes, shardings, specs, usable

BITS = [(16.0, 16.0), (32.0, 32.0), (8.0, 16.0), (4.15625, 16.0)]


def tensor_by_tensor(footprint: Footprint, old: Sharding | None, new: Sharding, rank: int) -> Change:
    """A change by walking over all device tensors."""

    def bits(tensor: DeviceTensor) -> float:
        return tensor.size * element(tensor)

    def element(tensor: DeviceTensor) -> float:
        return footprint.matrix_bits if tensor.matrix else footprint.other_bits

    held, wanted = (
        device_tensors(footprint.spec, s, rank, footprint.moe) if s and rank in s.ranks else ()
        for s in (old, new)
    )
    copies = copy_list_between(held, wanted)
    changed = [change for change in copies.changes if not change.reuse]
    before, after = sum(map(bits, held)), sum(map(bits, wanted))
    sizes = [(bits(c.tensor), bits(c.source) if c.source else 0.0) for c in changed]
    sizes.sort(key=lambda pair: (0, pair[0]) if pair[0] <= pair[1] else (1, -pair[1]))
    level, peak = before - sum(map(bits, copies.dropped)), before
    for new_size, old_size in sizes:
        peak = max(peak, level + new_size)
        level += new_size - old_size
    fetched = sum(element(c.tensor) * region_size(f.target) for c in changed for f in c.fetch)
    copied = sum(element(c.tensor) * region_size(k.target) for c in changed for k in c.keep)
    resident = before + sum(size for size, _ in sizes)
    figures = (before, after, resident, max(peak, level), fetched, copied)
    return Change(*(ceil(figure / 8) for figure in figures))


@settings(max_examples=40, deadline=None)
@given(spec=specs(), bits=st.sampled_from(BITS), data=st.data())
def test_layers_that_are_alike_are_counted_once(
    spec: ModelSpec, bits: tuple[float, float], data: st.DataObject
) -> None:
    moe = data.draw(st.none() | moes(spec))
    world = data.draw(st.sampled_from([n for n in range(1, 13) if usable(spec, n, moe)]))
    old, new = (data.draw(shardings(spec, world, moe)) for _ in range(2))
    footprint = Footprint(spec, moe, matrix_bits=bits[0], other_bits=bits[1])
    for start in (old, None):
        changes = footprint.changes(start, new)
        assert changes == tuple(tensor_by_tensor(footprint, start, new, rank) for rank in range(world))
    assert footprint.held(new) == tuple(change.after for change in footprint.changes(old, new))


@pytest.mark.parametrize(("name", "dtype"), list(zip(AWKWARD, ["bfloat16", "float32"] * 3, strict=True)))
def test_of_one_type_they_are_the_engines_own(name: str, dtype: str) -> None:
    spec, bits = AWKWARD[name], 16.0 if dtype == "bfloat16" else 32.0
    footprint = Footprint(spec, None, matrix_bits=bits, other_bits=bits)
    for first, second in combinations(usable(spec, 4), 2):
        old, new = make_sharding(spec, first), make_sharding(spec, second, ranks=(1, 2, 3, 0))
        old = carrying(spec, old)
        for rank, change in enumerate(footprint.changes(old, new)[:2]):
            copies = copy_list(spec, old, new, rank)
            assert change.before == weight_bytes(spec, old, rank, dtype)
            assert change.after == weight_bytes(spec, new, rank, dtype)
            assert change.fetched == copies.bytes_fetched(dtype)
            assert change.copied == copies.bytes_copied(dtype)
            for mode in ("resident", "delta", "reload"):
                peak = plan_peak_bytes(spec, old, new, mode=mode, dtype=dtype, rank=rank)
                assert change.peak(mode) == peak


def test_ranks_that_come_and_go() -> None:
    spec = AWKWARD["kv3-plain"]
    footprint = Footprint(spec, None, matrix_bits=16.0, other_bits=16.0)
    old = make_sharding(spec, Layout.parse("P2"), ranks=(4, 1))
    new = make_sharding(spec, Layout.parse("T3"), ranks=(9, 1, 4))
    one, four, nine = footprint.changes(old, new)
    assert nine.before == nine.copied == 0 and nine.fetched == nine.after == nine.delta
    assert (one.before, four.before) == tuple(weight_bytes(spec, old, rank, "bfloat16") for rank in (1, 4))
    assert 0 < one.fetched < one.after


@settings(max_examples=40, deadline=None)
@given(spec=specs(), bits=st.sampled_from(BITS), data=st.data())
def test_ranks_hold_the_model_once_beside_what_is_replicated(
    spec: ModelSpec, bits: tuple[float, float], data: st.DataObject
) -> None:
    """Replicated are what is not divided, KV heads where ranks exceed them, a tied embedding on two stages, and the
    norm of an FFN that two stages share."""
    moe = data.draw(st.none() | moes(spec))
    world = data.draw(st.sampled_from([n for n in range(1, 13) if usable(spec, n, moe)]))
    sharding = data.draw(shardings(spec, world, moe))
    footprint = Footprint(spec, moe, matrix_bits=bits[0], other_bits=bits[1])
    layout = sharding.layout
    total = 0.0
    for layer in range(spec.layers):
        for parameter in layer_parameters(spec, layer, moe):
            element = bits[0] if parameter.matrix else bits[1]
            total += parameter.size * element * copies_of(parameter, spec, layout)
    for parameter in edge_parameters(spec):
        twice = 2 if spec.tied_embeddings and parameter.place == "embed" and layout.pp > 1 else 1
        total += parameter.size * bits[1] * copies_of(parameter, spec, layout) * twice
    total += sum(map(bool, sharding.carried)) * spec.hidden * bits[1] * layout.tp
    held = sum(footprint.held(sharding))
    assert 0 <= held - layout.dp * total / 8 < world, "rounded up on each rank"


def copies_of(parameter: Parameter, spec: ModelSpec, layout: Layout) -> float:
    """Among the ranks of a stage."""
    if parameter.split is None:
        return layout.tp
    if parameter.split.axis == "kv_heads":
        return max(1.0, layout.tp / spec.kv_heads)
    return 1


@settings(max_examples=40, deadline=None)
@given(spec=specs(), data=st.data())
def test_more_tensor_parallelism_never_takes_more_memory(spec: ModelSpec, data: st.DataObject) -> None:
    moe = data.draw(st.none() | moes(spec))
    footprint = Footprint(spec, moe, matrix_bits=4.15625, other_bits=16.0)
    pp = data.draw(st.integers(1, spec.layers))
    most = [
        max(footprint.held(make_sharding(spec, layout, moe=moe)))
        for layout in (Layout(pp=pp, tp=tp) for tp in range(1, 13))
        if layout in usable(spec, layout.world, moe)
    ]
    assert most == sorted(most, reverse=True)
