"""What a worker makes of its configuration, without starting one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from seesaw.execution.messages import WorkerConfig
from seesaw.execution.worker import arena_of

BUDGET = 8 << 20


@pytest.mark.parametrize(
    ("device", "mode", "size"),
    [
        ("cpu", "delta", BUDGET * 9 // 8),
        ("cpu", "resident", BUDGET),
        ("cpu", "reload", BUDGET),
        ("cuda", "delta", 0),
    ],
)
def test_ranks_on_the_host_have_an_arena_for_their_weights(device: str, mode: str, size: int) -> None:
    config = SimpleNamespace(device=device, transition_mode=mode, weight_budget=BUDGET)
    arena = arena_of(cast(WorkerConfig, config))
    assert (arena.size if arena else 0) == size
