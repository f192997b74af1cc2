"""What a worker makes of its configuration, without starting one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from seesaw.core.layout import Layout
from seesaw.execution.messages import ShardingMessage, WorkerConfig
from seesaw.execution.worker import arena_of
from seesaw.weights.rehearsal import arena_bytes
from seesaw.weights.sharding import make_sharding, plan_peak_bytes
from tests.weights.shapes import TINY

PAIR = [make_sharding(TINY, Layout.parse(layout)) for layout in ("P4", "D2T2")]
BUDGET = plan_peak_bytes(TINY, PAIR[0], PAIR[1], mode="delta", dtype="float32", rank=1)
SCATTERED = arena_bytes(TINY, PAIR, 1, "float32", BUDGET)


@pytest.mark.parametrize(
    ("device", "mode", "layouts", "size"),
    [
        ("cpu", "delta", 2, SCATTERED),
        ("cpu", "delta", 1, BUDGET),
        ("cpu", "resident", 2, BUDGET),
        ("cpu", "reload", 2, BUDGET),
        ("cuda", "delta", 2, 0),
    ],
)
def test_ranks_on_the_host_have_an_arena_for_their_weights(
    device: str, mode: str, layouts: int, size: int
) -> None:
    messages = [
        ShardingMessage(str(s.layout), [len(stage) for stage in s.stages], list(s.ranks), [])
        for s in PAIR[:layouts]
    ]
    config = SimpleNamespace(
        device=device,
        transition_mode=mode,
        weight_budget=BUDGET,
        spec=TINY,
        shardings=messages,
        rank=1,
        dtype="float32",
    )
    arena = arena_of(cast(WorkerConfig, config))
    assert (arena.size if arena else 0) == -(-size // 64) * 64
    assert SCATTERED > BUDGET
