"""Records of runs that never were, for the tests of their page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.core.stats import TransitionRecord
from seesaw.recording.bounded import History, PhaseSpan
from seesaw.recording.record import Record, Run, RunSetup, Sample
from tests.jobs.echo_engine import EchoEngine
from tests.planning.machines import hardware

SPEC = ModelSpec(
    family="llama",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=1000,
    max_position=512,
    rms_eps=1e-5,
    rope=RopeSpec(),
)
SETUP = RunSetup(
    model="m",
    spec=SPEC,
    dummy_weights=False,
    dtype="bfloat16",
    plan="P2->T2",
    ranks=2,
    device="cpu",
    device_memory=8 << 20,
    host_kv=2 << 20,
    chunk=256,
    max_running=16,
    policy="seesaw",
    max_model_len=512,
    block_size=16,
    transition="delta",
    overlap=True,
    hardware=hardware(ranks=2),
    no_hardware="",
)


def run(**changes: Any) -> Run:
    """100 rows in 10 s: 4 s of prefill, 1 s of transition, 5 s of decoding. Its engine was 3 s old when it began."""
    stats = replace(
        EchoEngine().stats(),
        prompt_tokens=5000,
        output_tokens=1000,
        seconds_per_phase={"prefill": 3.0, "transition": 1.0, "decode": 4.0},
        rank_host_seconds={"decode": 0.5},
        host_seconds={"prefill": 0.5, "decode": 0.4},
        wall_seconds={"prefill": 4.0, "transition": 1.0, "decode": 5.0},
        steps={"prefill": 20, "decode": 100},
        phase_tokens={"prefill": 5000, "decode": 900},
        phase_sampled={"prefill": 100, "decode": 900},
        phase_stepped={"prefill": 0, "decode": 900},
        phase_keys={"prefill": 127500, "decode": 49500},
        phase_keys_read={"prefill": 0, "decode": 49500},
        device_kv_pool_bytes=1 << 20,
        transitions=(),
    )
    given: dict[str, Any] = {
        "seesaw": "0.1",
        "versions": {"python": "3.11"},
        "machine": "box",
        "command": {"model": "models/m", "input": ["in.jsonl"], "output": "out.jsonl"},
        "started": "2026-11-21T10:00:00+00:00",
        "written": "2026-11-21T10:00:10+00:00",
        "state": "finished",
        "setup": SETUP,
        "rows_answered": 98,
        "rows_failed": 2,
        "failures": {"invalid_json": 2},
        "elapsed_seconds": 10.0,
        "plans": [(3.0, "P2->T2")],
        "timeline": [
            Sample(3.0 + i / 10, "decode", i, 50 * i, 10 * i, (100 - i) << 13, (i % 10) << 15, 5, 5)
            for i in range(101)
        ],
        "transitions": [TransitionRecord("T2", 3 << 20, 1.0, "delta", moving_seconds=0.5, at=8.0)],
        "transition_count": 1,
        "transition_bytes": 3 << 20,
        "history": History(
            phases=[
                PhaseSpan(3.0, 4.0, "prefill"),
                PhaseSpan(7.0, 1.0, "transition"),
                PhaseSpan(8.0, 5.0, "decode"),
            ],
            prompts={48: 60, 50: 40},
            outputs={10: 100},
            sample=[(50, 10)] * 100,
        ),
        "stats": stats,
    }
    return Run(**given | changes)


def static() -> Run:
    """As `run`, under one layout."""
    whole, stats = run(), run().stats
    assert stats is not None
    mixed = {
        name: {"mixed": sum(getattr(stats, name).values())}
        for name in ("seconds_per_phase", "host_seconds", "wall_seconds", "steps", "phase_tokens")
    }
    return run(
        plans=[(3.0, "T2")],
        transitions=[],
        transition_count=0,
        transition_bytes=0,
        stats=replace(stats, **mixed),
        history=History(
            phases=[PhaseSpan(3.0, 10.0, "mixed")],
            prompts=whole.history.prompts,
            outputs=whole.history.outputs,
        ),
    )


def empty(**changes: Any) -> Run:
    """A run that met no row that could be served."""
    nothing = replace(
        EchoEngine().stats(), prompt_tokens=0, seconds_per_phase={}, transitions=(), host_kv_peak_bytes=0
    )
    first = {
        "rows_answered": 0,
        "rows_failed": 0,
        "failures": {},
        "elapsed_seconds": 0.0,
        "timeline": [Sample(3.0, "idle", 0, 0, 0, 0, 0, 0, 0)],
        "transitions": [],
        "transition_count": 0,
        "transition_bytes": 0,
        "history": History(),
        "stats": nothing,
    }
    return run(**first | changes)


def record(*runs: Run) -> Record:
    return Record(runs=list(runs or [run()]))
