"""Copying boxes: by the native kernel as by torch, and nothing beside the box."""

from __future__ import annotations

import pytest
import torch

from seesaw.native import build
from seesaw.weights import copies
from seesaw.weights.copies import copy_box
from seesaw.weights.intervals import Interval, Region

BOXES: list[tuple[tuple[int, ...], Region, Region]] = [
    ((5000,), (Interval(3, 4099),), (Interval(7, 4103),)),
    ((40, 700), (Interval(1, 39), Interval(5, 695)), (Interval(0, 38), Interval(10, 700))),
    ((40, 700), (Interval(0, 40), Interval(0, 700)), (Interval(0, 40), Interval(0, 700))),
    ((40, 700), (Interval(2, 3), Interval(0, 700)), (Interval(39, 40), Interval(0, 700))),
    ((90, 9), (Interval(0, 90), Interval(4, 5)), (Interval(0, 90), Interval(0, 1))),
    ((64, 64), (Interval(0, 0), Interval(0, 64)), (Interval(5, 5), Interval(0, 64))),
]


def lengths(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize(("shape", "origin", "place"), BOXES)
def test_a_box_is_copied_and_nothing_else(
    shape: tuple[int, ...],
    origin: Region,
    place: Region,
    dtypes: tuple[str, str],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if native and build.load() is None:
        pytest.skip("no native library here")
    if not native:
        monkeypatch.setattr(copies, "load", lambda: None)
    source = torch.randn(shape).to(getattr(torch, dtypes[0]))
    target = torch.full(shape, 7.0, dtype=getattr(torch, dtypes[1]))
    wanted = target.clone()
    wanted[lengths(place)] = source[lengths(origin)].to(target.dtype)
    copy_box(source, origin, target, place)
    assert torch.equal(target, wanted)


def test_the_kernel_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.load() is None:
        pytest.skip("no native library here")
    calls = []
    monkeypatch.setattr(copies, "_bind", lambda library: lambda *args: calls.append(args))
    whole = (Interval(0, 4), Interval(0, 8))
    copy_box(torch.ones(4, 8), whole, torch.empty(4, 8), whole)
    copy_box(torch.ones(8, 4).T, whole, torch.empty(4, 8), whole)  # not in rows
    copy_box(torch.ones(4, 8), whole, torch.empty(4, 8, dtype=torch.bfloat16), whole)  # converts
    assert len(calls) == 1
