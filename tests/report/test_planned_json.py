"""What the planner's commands write as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import seesaw
from seesaw.core.layout import Plan
from seesaw.planning.bound import Bound
from seesaw.planning.setup import set_up
from seesaw.report import planned_json
from seesaw.report.planned_json import RankingEntry, SimulationEntry, encoded, ranking_entry, simulation_entry
from seesaw.report.replays import Replay
from tests.report.planned import JOB, LATENCY, LIMITS, MODEL, NODE, RESHARDED, STATIC, ranking


def test_a_ranking() -> None:
    found = ranking()
    text = encoded(ranking_entry(found, profile=Path("p.json"), command="seesaw run", notes=["a note"]))
    entry = msgspec.json.decode(text, type=RankingEntry)
    assert (entry.version, entry.best, entry.best_static, entry.considered) == (1, "P4->T4", "T4", 321)
    assert (entry.profile, entry.command, entry.dtype) == ("p.json", "seesaw run", "bfloat16")
    assert entry.notes == ["something was assumed", "a note"]
    assert entry.hardware == NODE
    assert (entry.workload.requests, entry.workload.sampled, entry.workload.mean_prompt) == (1000, 1000, 300)
    assert entry.bound.seconds == 100.0
    assert [(r.plan, r.reason) for r in entry.refused] == list(found.refused)
    ours, static, estimated = entry.plans
    assert (ours.plan, ours.static, ours.tokens_per_second, ours.over_best_static) == (
        "P4->T4",
        False,
        2000,
        1.25,
    )
    assert ours.share_of_bound == 0.5
    assert ours.settings.stages == ([8, 8, 8, 8], [32]) and ours.settings.policy == "seesaw"
    assert found.best.setup is not None
    carried = found.best.setup.shardings[0].carried
    assert ours.settings.carried == (list(carried), [])
    assert ours.settings.transition == found.best.setup.memory.mode
    assert ours.memory is not None and len(ours.memory.weights) == 4
    assert [sum(parts.values()) for parts in ours.memory.parts] == ours.memory.workspace
    assert ours.replay is not None and ours.replay.phases["decode"].causes["weights"] == 80.0
    assert ours.replay.buffer[1] == (80.0, 0.9)
    assert static.replay is not None and set(static.replay.phases) == {"mixed"}
    assert estimated.replay is None and estimated.memory is None and estimated.estimate.batch == 250.0
    assert estimated.settings.chunk == 512 and estimated.settings.stages is None


def test_replays_and_one_that_does_not_fit() -> None:
    plan = Plan.parse("P4->T4")
    replays = [
        Replay(name="D4", limits=LIMITS, error="does not fit"),
        Replay(
            name="P4->T4",
            limits=LIMITS,
            setup=set_up(MODEL, plan, "bfloat16", LIMITS),
            simulated=replace(RESHARDED, latency=LATENCY),
        ),
        Replay(name="T4", limits=LIMITS, simulated=STATIC),
    ]
    bound = Bound(seconds=100.0, prefill_seconds=60.0, decode_seconds=40.0, flops=1.0, bytes=2.0)
    text = encoded(
        simulation_entry(MODEL, NODE, JOB, replays, dtype="bfloat16", bound=bound, profile=None, notes=())
    )
    entry = msgspec.json.decode(text, type=SimulationEntry)
    refused, first, second = entry.plans
    assert refused.error == "does not fit" and refused.replay is None and refused.over_first is None
    assert first.over_first == 1.0 and second.over_first == pytest.approx(0.8)
    assert first.replay is not None and first.replay.latency is not None
    assert first.replay.latency.ttft == {"p50": 0.5, "p90": 1.5, "p99": 70.0}
    assert json.loads(text)["plans"][1]["replay"]["latency"]["end_to_end"]["p99"] == 99.0


def test_the_page_names_every_key() -> None:
    page = (Path(seesaw.__file__).parents[2] / "docs" / "planning.md").read_text()
    structs = [value for name, value in vars(planned_json).items() if name.endswith(("Entry", "Plan"))]
    keys = {field for struct in structs for field in struct.__struct_fields__}
    assert len(structs) == 15 and {"over_first", "causes", "inter_token"} <= keys
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]
