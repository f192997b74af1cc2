"""Layouts and plans: what parses, what is refused and how it is said."""

from __future__ import annotations

import pytest

from seesaw.core.errors import ConfigError, LayoutError
from seesaw.core.layout import Coordinate, Layout, Plan
from seesaw.core.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "layout", "written"),
    [
        ("T4", Layout(1, 1, 4), "T4"),
        ("p4", Layout(1, 4, 1), "P4"),
        ("T2P2", Layout(1, 2, 2), "P2T2"),
        ("D2P2T2", Layout(2, 2, 2), "D2P2T2"),
        ("D1P1T1", Layout(1, 1, 1), "T1"),
    ],
)
def test_layouts_parse(text: str, layout: Layout, written: str) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == written
    assert Layout.parse(written) == layout


@pytest.mark.parametrize("text", ["", "4", "X2", "T0", "T2T2", "T-1", "T2 P2", "DPT"])
def test_bad_layouts_are_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="layout"):
        Layout.parse(text)


def test_coordinates_count_tensor_ranks_fastest() -> None:
    layout = Layout(2, 3, 2)
    assert layout.coordinate(0) == Coordinate(0, 0, 0)
    assert layout.coordinate(1) == Coordinate(0, 0, 1)
    assert layout.coordinate(2) == Coordinate(0, 1, 0)
    assert layout.coordinate(6) == Coordinate(1, 0, 0)
    assert [layout.index(layout.coordinate(i)) for i in range(12)] == list(range(12))


def test_plans_parse() -> None:
    plan = Plan.parse("P4→T4")
    assert plan == Plan.parse("P4->T4") and str(plan) == "P4->T4"
    assert plan.separate and plan.reshards and plan.world == 4
    time_separated = Plan.parse("P2->P2")
    assert time_separated.separate and not time_separated.reshards
    static = Plan.parse("T4")
    assert not static.separate and str(static) == "T4"


@pytest.mark.parametrize(
    ("text", "said"), [("P4->T2", "4.*2"), ("P2->T2->P2", "found 3"), ("P2->", "layout ''")]
)
def test_bad_plans_are_refused(text: str, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "count"), [("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9), (7, 7)]
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "4 apples", "-1GiB", "1e9"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


def test_sizes_read_well() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(3 << 30) == "3.00 GiB"
