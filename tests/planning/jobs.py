"""Random models, nodes, plans and small workloads for properties of the twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import Curve, HardwareSpec
from seesaw.core.layout import Plan
from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.core.moe import MoESpec
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import WEIGHT_BITS, PlannedModel
from seesaw.planning.workloads import Workload
from seesaw.scheduling.config import TurnCosts
from tests.planning.machines import hardware, line

PLANS = {
    1: ["T1", "T1->T1"],
    2: ["T2", "P2", "D2", "P2->T2", "T2->D2", "D2->P2", "P2->P2", "D2->D2"],
    4: ["T4", "P4", "D2P2", "T2P2", "P4->T4", "D2P2->T4", "T2P2->D2T2", "P4->D4", "T2P2->T2P2", "D4->P4"],
}
STATIC = ["chunked", "prefill-first", "decode-first"]
SEPARATE = ["seesaw", "prefill-first", "decode-first"]


@dataclass(frozen=True)
class Job:
    """What the twin is given."""

    setup: Setup
    hardware: HardwareSpec
    workload: Workload

    @property
    def room(self) -> int:
        """Tokens whose KV the devices hold at once, in the phase that holds most."""
        scheduler = self.setup.scheduler
        layouts = self.setup.plan.prefill, self.setup.plan.decode
        blocks = [n * layout.dp for n, layout in zip(scheduler.device_blocks, layouts, strict=True)]
        return max(blocks) * scheduler.block_size


@st.composite
def models(draw: st.DrawFn) -> PlannedModel:
    """Dense ones, mixtures of experts, quantised ones."""
    layers, heads = draw(st.integers(4, 8)), draw(st.sampled_from([4, 8]))
    spec = ModelSpec(
        family="llama",
        layers=layers,
        hidden=draw(st.sampled_from([256, 1024])),
        heads=heads,
        kv_heads=draw(st.sampled_from([1, 2, heads])),
        head_dim=64,
        ffn=draw(st.sampled_from([512, 3000])),
        vocab=draw(st.sampled_from([1000, 32000])),
        max_position=4096,
        rms_eps=1e-5,
        rope=RopeSpec(),
        tied_embeddings=draw(st.booleans()),
    )
    moe = None
    if draw(st.booleans()):
        experts = draw(st.sampled_from([4, 16]))
        moe = MoESpec(
            experts=experts,
            experts_per_token=draw(st.integers(1, 4)),
            expert_ffn=draw(st.sampled_from([128, 512])),
            shared_ffn=draw(st.sampled_from([0, 256])),
            sparse=tuple(range(draw(st.integers(0, 1)), layers, draw(st.integers(1, 2)))),
        )
    return PlannedModel(
        name="drawn",
        spec=spec,
        moe=moe,
        weight_bits=WEIGHT_BITS[draw(st.sampled_from(["bfloat16", "fp8", "int4"]))],
        kv_bits=draw(st.sampled_from([8, 16])),
    )


@st.composite
def nodes(draw: st.DrawFn, ranks: int) -> HardwareSpec:
    """Slow to fast, 40 to 400 flops a byte; curves that rise, overheads or none, links of all speeds."""
    flops = draw(st.sampled_from([1e11, 1e12, 1e13]))
    link = draw(st.sampled_from([1e8, 1e9, 1e10]))
    host = draw(st.sampled_from([1e8, 1e9, 1e10]))
    least = draw(st.floats(0.05, 1.0))
    best = draw(st.floats(least, 1.0))
    overhead = draw(st.sampled_from([0.0, 3e-6]))
    return hardware(
        ranks=ranks,
        flops={"bfloat16": flops},
        bandwidth=flops / draw(st.floats(40.0, 400.0)),
        product=Curve((8.0, 512.0), (least, best)),
        prefill_attention=Curve((1e6, 1e10), (least / 2, best / 2)),
        decode_attention=Curve((1e4, 1e7), (least, best)),
        operator_overhead=overhead,
        step_overhead=100 * overhead,
        all_reduce={n: line(1e-5, link / n) for n in (2, 4, 8)},
        send=line(1e-5, link),
        to_host=host,
        to_device=host,
        node_to_host=host * draw(st.floats(1.0, ranks)),
        node_to_device=host * draw(st.floats(1.0, ranks)),
    )


@st.composite
def workloads(draw: st.DrawFn, arrivals: bool = False) -> Workload:
    """A few short requests."""
    count, seed = draw(st.integers(1, 40)), draw(st.integers(0, 1 << 16))
    rng = np.random.default_rng(seed)
    longest, most = draw(st.sampled_from([8, 100, 300])), draw(st.sampled_from([1, 8, 60]))
    return Workload(
        "drawn",
        rng.integers(1, longest + 1, count),
        rng.integers(1, most + 1, count),
        np.cumsum(rng.exponential(draw(st.floats(1e-4, 1.0)), count)) if arrivals else None,
    )


@st.composite
def jobs(draw: st.DrawFn, arrivals: bool = False) -> Job:
    """Whatever fits, from memory for one request at a time to memory for all."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    plan = Plan.parse(draw(st.sampled_from(PLANS[ranks])))
    model, workload = draw(models()), draw(workloads(arrivals=arrivals))
    weights, kv = model.weight_bytes(), model.kv_bytes_per_token()
    longest = workload.longest + 16
    limits: dict[str, Any] = {
        "device_memory": 4 * weights,
        "host_kv": kv * longest * draw(st.sampled_from([2, 4, 20] if plan.separate else [0, 4])),
        "policy": draw(st.sampled_from(SEPARATE if plan.separate else STATIC)),
        "chunk": draw(st.sampled_from([32, 256])),
        "max_running": draw(st.sampled_from([2, 16, 64])),
        "micro_batches": draw(st.sampled_from([None, (plan.prefill.pp, plan.decode.pp + 1)])),
        "turn_costs": draw(st.sampled_from([None, TurnCosts(step=1e-3, turn=1e-2, block=1e-5)])),
        "max_model_len": longest,
        "transition": draw(st.sampled_from(["resident", "delta", "reload"])) if plan.reshards else None,
        "overlap": draw(st.booleans()),
    }
    roomy = set_up(model, plan, "bfloat16", Limits(**limits))
    # Down to a few requests at a time: of the memory that is left on the fullest rank, a share is taken away.
    used = max(w + s for w, s in zip(roomy.memory.weights, roomy.memory.workspace, strict=True))
    limits["device_memory"] = used + draw(st.sampled_from([2, 5, 30])) * kv * longest
    try:
        chosen = set_up(model, plan, "bfloat16", Limits(**limits))
    except MemoryBudgetError:
        chosen = roomy
    return Job(chosen, draw(nodes(ranks)), workload)
