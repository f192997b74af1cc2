"""What a plan is worked out to where nothing is said."""

from __future__ import annotations

import pytest

from seesaw.core.layout import Plan
from seesaw.planning.setup import Limits, set_up
from tests.planning.machines import model


def limits(**changes: int | str) -> Limits:
    return Limits(device_memory=1 << 30, host_kv=64 << 20, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "chunk"), [("T4", 2048), ("P2->T2", 1024), ("P4->T4", 512), ("D2P2->T4", 1024), ("P8", 256)]
)
def test_stages_share_the_tokens_in_flight(plan: str, chunk: int) -> None:
    assert set_up(model(), Plan.parse(plan), "bfloat16", limits()).scheduler.max_batch_tokens == chunk
    asked = set_up(model(), Plan.parse(plan), "bfloat16", limits(chunk=64))
    assert asked.scheduler.max_batch_tokens == 64


@pytest.mark.parametrize(("plan", "policy"), [("T2", "chunked"), ("P2->P2", "seesaw"), ("P2->T2", "seesaw")])
def test_the_policy_follows_from_the_phases(plan: str, policy: str) -> None:
    assert set_up(model(), Plan.parse(plan), "bfloat16", limits()).scheduler.policy == policy
    asked = set_up(model(), Plan.parse(plan), "bfloat16", limits(policy="decode-first"))
    assert asked.scheduler.policy == "decode-first"
