"""The bound: worked out by hand, and never beaten by any plan in the twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import Curve
from seesaw.core.moe import MoESpec
from seesaw.planning.bound import Bound, bound
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.twin import simulate
from seesaw.planning.workloads import Workload
from tests.planning.jobs import Job, jobs
from tests.planning.machines import hardware, model

KV = 2 * 1024 * 512  # elements of K and V of a layer
LAYER = 2 * 1024 * 1024 + KV + 3 * 1024 * 2816
HEAD = 1024 * 32000
ALL = 8 * LAYER + HEAD


def requests(*lengths: tuple[int, int]) -> Workload:
    prompt, output = np.array(lengths).T
    return Workload("by hand", prompt, output)


def found(
    work: Workload, room: float | None = 1e9, planned: PlannedModel | None = None, **node: object
) -> Bound:
    return bound(planned or model(), hardware(**node), work, "bfloat16", max_resident_tokens=room)


def test_prompts_are_bound_by_arithmetic() -> None:
    """Eight ranks of 1 TFLOP/s; the last layer and the head run on one token of each prompt."""
    products = 2 * (2 * 1000 * (7 * LAYER + KV) + 2 * (LAYER - KV + HEAD))
    attention = 4 * 7 * 1024 * 2 * (1000 * 1001 / 2)
    work = requests((1000, 1), (1000, 1))
    result = found(work)
    assert result.flops == pytest.approx(products + attention)
    assert result.seconds == result.prefill_seconds == pytest.approx((products + attention) / 8e12)
    assert result.decode_seconds == 0.0
    half = found(work, product=Curve((1.0, 64.0), (0.1, 0.5)), prefill_attention=Curve((1.0,), (0.25,)))
    assert half.seconds == pytest.approx((products / 0.5 + attention / 0.25) / 8e12)


def test_steps_read_the_weights_and_what_was_said() -> None:
    """Two requests of 10 tokens in, 5 out: 5 Forwards at least, each of which reads everything once."""
    result = found(requests((10, 5), (10, 5)))
    keys = 2 * (11 + 12 + 13 + 14)
    kv = keys * 8 * 2 * 512 * 2
    assert result.bytes == pytest.approx(5 * ALL * 2 + kv)
    assert result.seconds == pytest.approx((5 * ALL * 2 + kv) / 8e10)
    assert result.decode_seconds == pytest.approx((4 * ALL * 2 + kv) / 8e10)
    slow = found(requests((10, 5), (10, 5)), decode_attention=Curve((1.0,), (0.5,)))
    assert slow.seconds == pytest.approx((5 * ALL * 2 + kv / 0.5) / 8e10)


def test_little_memory_takes_more_steps() -> None:
    """With room for 20 tokens, the 120 that stand in memory over all steps take 6 Forwards."""
    result = found(requests((10, 5), (10, 5)), room=20)
    assert 2 * (10 + 11 + 12 + 13 + 14) == 120
    assert result.bytes - found(requests((10, 5), (10, 5))).bytes == pytest.approx(ALL * 2)


def test_the_memory_that_weights_leave() -> None:
    planned = model()
    kv = planned.kv_bytes_per_token()
    memory = (planned.weight_bytes() + 20 * kv) // 8 + 1
    work = requests((10, 5), (10, 5))
    assert found(work, None, memory=memory) == found(work, 20)
    with pytest.raises(MemoryBudgetError, match="8xmade up have"):
        found(work, None, memory=planned.weight_bytes() // 8)


def test_quantised_weights_are_fewer_bytes_and_no_fewer_flops() -> None:
    work = requests((10, 5), (10, 5))
    four = found(work, planned=replace(model(), weight_bits=4.0, kv_bits=8))
    assert four.flops == found(work).flops
    keys = 2 * (11 + 12 + 13 + 14)
    assert four.bytes == pytest.approx(5 * (8 * LAYER / 2 + HEAD * 2) + keys * 8 * 2 * 512)


def test_experts_are_read_as_far_as_tokens_touch_them() -> None:
    """One request: every step passes 2 of 8 experts. Two at a time touch 3.5 of them on average."""
    moe = MoESpec(experts=8, experts_per_token=2, expert_ffn=512, sparse=tuple(range(8)))
    planned = replace(model(), moe=moe)
    around, expert = LAYER - 3 * 1024 * 2816, 3 * 1024 * 512
    one = found(requests((10, 3)), planned=planned)
    each = 2 * (8 * (around + 2 * expert) + HEAD)
    assert one.bytes == pytest.approx(3 * each + (11 + 12) * 8 * 2 * 512 * 2)
    both = found(requests((10, 3), (10, 3)), planned=planned)
    pair = 2 * (8 * (around + 3.5 * expert) + HEAD)
    assert both.bytes == pytest.approx(3 * pair + 2 * (11 + 12) * 8 * 2 * 512 * 2)
    assert both.flops == pytest.approx(2 * one.flops)


def test_a_sample_stands_for_its_job() -> None:
    sample = requests((100, 30), (50, 20))
    whole = Workload("whole", np.tile(sample.prompt, 10), np.tile(sample.output, 10))
    scaled, full = found(replace(sample, represented=20), 500), found(whole, 500)
    for name in ("seconds", "prefill_seconds", "decode_seconds", "flops", "bytes"):
        assert getattr(scaled, name) == pytest.approx(getattr(full, name))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_nothing_beats_it(job: Job) -> None:
    planned = job.setup.model
    result = bound(planned, job.hardware, job.workload, "bfloat16", max_resident_tokens=job.room)
    simulated = simulate(job.setup, job.hardware, job.workload)
    assert 0 < result.seconds <= simulated.seconds * (1 + 1e-9)
    assert result.seconds <= result.prefill_seconds + result.decode_seconds + 1e-12
    if job.setup.plan.separate:
        assert result.prefill_seconds + result.decode_seconds <= simulated.seconds * (1 + 1e-9)


def test_one_rank_comes_close_to_it() -> None:
    """Long steps on one device without overheads: the bound leaves nothing out that it could know."""
    from tests.planning.test_twin import setup

    node = hardware(ranks=1, memory=480 << 20)
    work = Workload("steps", np.full(32, 16), np.full(32, 200))
    one = setup("T1", max_running=32)
    result = bound(one.model, node, work, "bfloat16", max_resident_tokens=None)
    assert 0.9 < result.seconds / simulate(one, node, work).seconds <= 1.0
