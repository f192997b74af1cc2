"""A ranking made by hand: two plans replayed, one estimated, one refused, with figures that are easy to check."""

from __future__ import annotations

from dataclasses import replace

from seesaw.core.layout import Plan
from seesaw.planning.accounts import CAUSES, PhaseReport
from seesaw.planning.bound import Bound
from seesaw.planning.candidates import Candidate, Ranking
from seesaw.planning.catalogue import hardware
from seesaw.planning.estimate import Estimate
from seesaw.planning.latency import Latency
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.shapes import shape
from seesaw.planning.twin import Simulated
from seesaw.planning.workloads import workload

MODEL = shape("Llama-3.1-8B")
NODE = hardware("4xL4")
JOB = workload("in=300,out=100", requests=1000)
LIMITS = Limits(device_memory=20 << 30, host_kv=40 << 30, chunk=512, max_model_len=400)
ESTIMATE = Estimate(
    prefill_seconds=100.0, decode_seconds=120.0, transition_seconds=5.0, transitions=2, batch=250.0
)


def phase(forwards: int, **seconds: float) -> PhaseReport:
    """A phase of which each cause takes so many seconds."""
    causes = dict.fromkeys(CAUSES, 0.0) | seconds
    return PhaseReport(
        seconds=sum(seconds.values()), forwards=forwards, tokens=100 * forwards, batch=8.0, causes=causes
    )


RESHARDED = Simulated(
    seconds=200.0,
    requests=1000,
    prompt_tokens=300_000,
    output_tokens=100_000,
    phases={
        "prefill": phase(600, arithmetic=70.0, bubble=6.0, hand_over=4.0),
        "decode": phase(400, weights=80.0, all_reduce=30.0),
        "transition": phase(0, transition=10.0),
    },
    waited={"prefill": 88.0, "decode": 110.0, "transition": 2.0},
    transitions=4,
    swapped_out=3,
    recomputed=0,
    buffer=((0.0, 0.0), (80.0, 0.9), (190.0, 0.0)),
    latency=None,
)
STATIC = Simulated(
    seconds=250.0,
    requests=1000,
    prompt_tokens=300_000,
    output_tokens=100_000,
    phases={"mixed": phase(900, arithmetic=75.0, weights=50.0, all_reduce=125.0)},
    waited={"mixed": 250.0},
    transitions=0,
    swapped_out=0,
    recomputed=1,
    buffer=(),
    latency=None,
)
LATENCY = Latency(
    ttft={50: 0.5, 90: 1.5, 99: 70.0},
    inter_token={50: 0.02, 90: 0.03, 99: 0.2},
    end_to_end={50: 4.0, 90: 9.0, 99: 99.0},
)


def candidate(text: str, simulated: Simulated | None = None, scale: float = 1.0) -> Candidate:
    """A plan, worked out if it has a replay."""
    plan = Plan.parse(text)
    found = Candidate(plan=plan, limits=LIMITS, workload=JOB, estimate=ESTIMATE)
    if simulated is None:
        return found
    setup = set_up(MODEL, plan, "bfloat16", LIMITS)
    return replace(found, setup=setup, simulated=simulated, scale=scale)


def ranking(*replayed: Candidate) -> Ranking:
    """Of these, or of P4->T4 before T4; P2T2 is estimated, T2P2 refused."""
    return Ranking(
        model=MODEL,
        hardware=NODE,
        workload=JOB,
        dtype="bfloat16",
        replayed=replayed or (candidate("P4->T4", RESHARDED), candidate("T4", STATIC)),
        others=(candidate("P2T2"),),
        bound=Bound(seconds=100.0, prefill_seconds=60.0, decode_seconds=40.0, flops=1e15, bytes=1e12),
        refused=(("D4", "D4 needs 30 GiB a rank."), ("D4->D4", "no")),
        considered=321,
        notes=("something was assumed",),
    )
