"""Products whose sums travel while they are computed, against those that are computed first."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seesaw.core.partial_sums import MESSAGE_BYTES, MOST_PARTS, left_of_sum, part_bounds
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.profiling import Profile
from seesaw.execution.tracing import RankTrace
from seesaw.ops.torch_ops import TorchOperators
from seesaw.transport.base import Transport, has_partial_sums
from tests.transport.ranks import Setup, run_ranks


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 16, 100, 2048])
@pytest.mark.parametrize("columns", [64, 96, 100, 288, 1024, 2048, 8192])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("members", [2, 3, 4, 8])
def test_parts_cover_all_columns_and_are_worth_a_message(
    rows: int, columns: int, item: int, members: int
) -> None:
    bounds = part_bounds(rows, columns, item, members)
    widths = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and sum(widths) == columns and all(width > 0 for width in widths)
    assert len(widths) <= MOST_PARTS
    if len(widths) > 1:
        assert all(
            width % 64 == 0 and 2 * width * rows * item >= members * MESSAGE_BYTES for width in widths[:-1]
        )
    if rows * columns * item < members * MESSAGE_BYTES:
        assert widths == [columns]


def test_what_is_left_of_a_sum() -> None:
    assert left_of_sum(product=8.0, whole=4.0, parts=1) == 4.0
    assert left_of_sum(product=8.0, whole=4.0, parts=4) == 1.0  # only its last part
    assert left_of_sum(product=4.0, whole=8.0, parts=4) == 5.0  # it begins after a quarter of the product
    assert left_of_sum(product=0.0, whole=8.0, parts=4) == 8.0


@pytest.mark.parametrize(("rows", "dtype"), [(5, torch.float32), (33, torch.bfloat16), (300, torch.float32)])
@pytest.mark.parametrize("world", [2, 3])
def test_in_parts_as_at_once(rows: int, dtype: torch.dtype, world: int) -> None:
    """Small whole numbers, whose sums are exact in any order."""
    columns, depth = 1000, 40
    in_parts = len(part_bounds(rows, columns, dtype.itemsize, world)) > 2
    assert in_parts == (rows > 5)
    made = torch.Generator().manual_seed(rows)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=made).to(dtype)

    parts = [(whole(rows, depth), whole(columns, depth), whole(columns)) for _ in range(world)]
    total = sum(x.float() @ weight.float().T + bias.float() for x, weight, bias in parts)
    assert isinstance(total, Tensor)
    view = SimpleNamespace(tp_ranks=tuple(range(world)))

    def body(transport: Transport, rank: int) -> None:
        if in_parts:
            transport.all_reduce = None  # type: ignore[method-assign, assignment]
        group = TensorParallelGroup(view, transport)  # type: ignore[arg-type]
        found = group.linear(TorchOperators(), *parts[rank])
        assert found.is_contiguous() and torch.equal(found, total.to(dtype))

    with Setup("tcp", world) as setup:
        run_ranks(setup, body)


def test_every_rank_adds_up_its_share_of_a_part_while_later_parts_are_computed() -> None:
    world, part, each = 3, 6000, 2000
    together = multiprocessing.get_context("fork").Barrier(world)

    def body(transport: Transport, rank: int) -> None:
        x = torch.zeros(4 * part)

        def compute(i: int) -> None:
            together.wait(30)  # all have sent what was computed before
            if i == 3:
                assert torch.equal(x[rank * each : (rank + 1) * each], torch.full((each,), 6.0))
            x[i * part : (i + 1) * part] = rank + 1

        assert has_partial_sums(transport)
        transport.all_reduce_in_parts(x, [part] * 4, compute, tuple(range(world)))
        assert torch.equal(x, torch.full((4 * part,), 6.0))

    with Setup("tcp", world) as setup:
        run_ranks(setup, body)


class _Slow:
    """A transport whose sums take a while beside their parts."""

    def all_reduce(self, x: Tensor, members: object) -> Tensor:
        return x

    gather = broadcast = receive = all_reduce

    def all_reduce_in_parts(
        self, x: Tensor, counts: Sequence[int], compute: Callable[[int], object], members: object
    ) -> Tensor:
        for part in range(len(counts)):
            compute(part)
        time.sleep(0.05)
        return x


class _Sleepy:
    """Half of a product at a time."""

    def linear(self, x: Tensor, weight: Tensor) -> None:
        time.sleep(0.2)


def test_a_profile_books_the_parts_to_what_computes_them(tmp_path: Path) -> None:
    profile = Profile()
    operators, x = profile.wrap(_Sleepy(), ("linear",)), torch.ones(4, 4)
    transport = profile.wrap(_Slow(), ("all_reduce_in_parts",))
    with profile.forward("decode", 4):
        transport.all_reduce_in_parts(x, [8, 8], lambda part: operators.linear(x, x), (0, 1))
    profile.write(tmp_path / "p.json")
    functions = json.loads((tmp_path / "p.json").read_text())["decode"]["functions"]
    assert functions["linear 4x4"]["calls"] == 2 and functions["linear 4x4"]["seconds"] >= 0.4
    assert 0.05 <= functions["all_reduce_in_parts"]["seconds"] < 0.2


def test_a_trace_counts_the_exchange_alone() -> None:
    trace = RankTrace(0, lambda events: None)
    transport = trace.watch(_Slow())
    operators, x = _Sleepy(), torch.ones(4, 4)
    transport.all_reduce_in_parts(x, [8, 8], lambda part: operators.linear(x, x), (0, 1))
    assert 0.05 <= trace._exchanging < 0.2
