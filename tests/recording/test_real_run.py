"""The trace and the statistics of a real run under `P2->T2`: complete, consistent with each other, and live."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from seesaw import LLM, Request, SamplingParams
from seesaw.core.stats import EngineStats
from seesaw.execution.messages import Events
from seesaw.execution.tracing import RankTrace
from seesaw.recording.bounded import History
from seesaw.recording.recorder import Counts
from seesaw.report.metrics import MetricsServer
from tests.checkpoints import make_checkpoint

PROMPTS = [[3 + (7 * i + j) % 250 for j in range(20 + i % 30)] for i in range(48)]
NEW_TOKENS = 12


@dataclass
class Traced:
    events: list[dict[str, Any]]
    stats: EngineStats
    history: History
    scraped: dict[str, float]

    def rows(self) -> dict[str, int]:
        return {e["args"]["name"]: e["tid"] for e in self.events if e["name"] == "thread_name"}

    def spans(self, row: str, *names: str) -> list[dict[str, Any]]:
        tid = self.rows()[row]
        found = [e for e in self.events if e["ph"] == "X" and e["tid"] == tid]
        return [e for e in found if not names or e["name"] in names]


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (li.rpartition(" ") for li in lines if li[0] != "#")}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("traced")
    model = make_checkpoint(folder / "model", "llama")
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [
        Request(id=str(i), prompt_token_ids=tuple(p), sampling=sampling) for i, p in enumerate(PROMPTS)
    ]
    server = MetricsServer("127.0.0.1", 0)
    with LLM(
        model,
        plan="P2->T2",
        device_memory="4MiB",
        host_kv="1MiB",
        max_model_len=100,
        chunk=64,
        trace=str(folder / "run.json"),
    ) as llm:
        server.watch(llm.stats, lambda: Counts(answered=1, failed=2, total=48))
        outputs = llm.run(iter(requests))
        next(outputs)
        scraped = scrape(server.url)  # in the middle of the run
        assert len(list(outputs)) == len(PROMPTS) - 1
        stats, history = llm.stats(), llm.history()
    server.close()
    return Traced(json.loads((folder / "run.json").read_text()), stats, history, scraped)


def test_every_rank_has_its_rows(traced: Traced) -> None:
    assert set(traced.rows()) == {
        "phases",
        "scheduler",
        *("rank 0", "rank 0 copies", "rank 1", "rank 1 copies"),
    }


def test_every_forward_appears_once_on_each_rank(traced: Traced) -> None:
    forwards = [traced.spans(f"rank {rank}", "prefill", "decode", "mixed") for rank in (0, 1)]
    first, second = (Counter(e["args"]["id"] for e in spans) for spans in forwards)
    assert first == second
    assert set(first.values()) == {1}
    for phase in ("prefill", "decode"):
        spans = [e for e in forwards[0] if e["name"] == phase]
        assert len(spans) == traced.stats.steps[phase]
        assert sum(e["args"]["tokens"] for e in spans) == traced.stats.phase_tokens[phase]


@pytest.mark.parametrize("row", ["rank 0", "rank 1", "rank 0 copies", "rank 1 copies", "scheduler", "phases"])
def test_spans_of_a_row_follow_each_other_or_lie_within_each_other(row: str, traced: Traced) -> None:
    spans = sorted((e["ts"], -e["dur"], e["name"]) for e in traced.spans(row))
    open_until: list[float] = []
    for start, minus, name in spans:
        while open_until and open_until[-1] <= start + 0.01:  # a hundredth of a microsecond: rounding
            open_until.pop()
        if open_until:
            assert name.startswith("wait for"), f"{name} on row {row} lies within another span"
            assert start - minus <= open_until[-1] + 0.01
        open_until.append(start - minus)


def test_stages_are_seen_to_wait(traced: Traced) -> None:
    assert traced.spans("rank 1", "wait for stage")
    assert any(
        e["args"].get("collectives_ms") for e in traced.spans("rank 0", "decode")
    )  # tensor-parallel ranks add up


def test_phases_cover_the_run(traced: Traced) -> None:
    spans = sorted(traced.spans("phases"), key=lambda e: e["ts"])
    assert {e["name"] for e in spans} >= {"prefill", "decode", "transition"}
    for one, other in pairwise(spans):
        assert abs(one["ts"] + one["dur"] - other["ts"]) < 0.01
    wall = {name: seconds for name, seconds in traced.stats.wall_seconds.items() if name != "idle"}
    for name, seconds in wall.items():
        assert sum(e["dur"] for e in spans if e["name"] == name) / 1e6 == pytest.approx(seconds, abs=1e-3)
    history = traced.history.phases
    assert sum(span.seconds for span in history) == pytest.approx(sum(traced.stats.wall_seconds.values()))
    forwards = [e for rank in (0, 1) for e in traced.spans(f"rank {rank}", "prefill", "decode")]
    assert spans[0]["ts"] <= min(e["ts"] for e in forwards)
    # the run ends with the report of the rank that samples; another one may still be leaving its Forward
    assert spans[-1]["ts"] + spans[-1]["dur"] >= max(e["ts"] for e in forwards)


def test_bytes_are_those_of_the_statistics(traced: Traced) -> None:
    copies = [e for rank in (0, 1) for e in traced.spans(f"rank {rank} copies")]
    moved: Counter[str] = Counter()
    for event in copies:
        moved[event["name"]] += event["args"].get("bytes", 0)
    assert moved["swap-in"] == traced.stats.swapped_in_bytes > 0
    assert moved["write-through"] + moved["swap-out"] == traced.stats.swapped_out_bytes > 0
    transitions = [e for rank in (0, 1) for e in traced.spans(f"rank {rank}", "transition")]
    assert len(transitions) == 2 * len(traced.stats.transitions)
    assert len(traced.stats.transitions) >= 3
    assert sum(e["args"].get("bytes", 0) for e in transitions) == sum(
        record.bytes for record in traced.stats.transitions
    )
    assert sum(e["args"]["copied_bytes"] for e in transitions) == sum(
        record.copied_bytes for record in traced.stats.transitions
    )


def test_counters_rise_and_fall(traced: Traced) -> None:
    names = {e["name"] for e in traced.events if e["ph"] == "C"}
    assert names == {
        *("host buffer (MiB)", "device KV (MiB)", "running sequences"),
        *("prompt tokens/s", "output tokens/s"),
    }


def test_what_was_done_is_counted(traced: Traced) -> None:
    stats, prompt_tokens = traced.stats, sum(map(len, PROMPTS))
    assert stats.prompt_tokens_fed == stats.prompt_tokens == prompt_tokens
    assert stats.tokens_sampled == stats.output_tokens == NEW_TOKENS * len(PROMPTS)
    assert stats.phase_stepped == {"prefill": 0, "decode": (NEW_TOKENS - 1) * len(PROMPTS)}
    assert stats.phase_keys["prefill"] == sum(len(p) * (len(p) + 1) // 2 for p in PROMPTS)
    keys = sum(len(p) + i for p in PROMPTS for i in range(1, NEW_TOKENS))
    assert stats.phase_keys["decode"] == stats.phase_keys_read["decode"] == keys
    assert sum(traced.history.outputs.values()) == len(PROMPTS)
    assert sorted(traced.history.sample) == sorted((len(p), NEW_TOKENS) for p in PROMPTS)
    assert stats.host_kv_used_bytes == stats.device_kv_used_bytes == 0
    assert stats.device_kv_pool_bytes > 0


def test_metrics_tell_of_the_run_while_it_lasts(traced: Traced) -> None:
    scraped, stats = traced.scraped, traced.stats
    assert scraped['seesaw_rows_total{state="answered"}'] == 1
    assert scraped['seesaw_rows_total{state="failed"}'] == 2
    assert scraped["seesaw_input_rows"] == 48
    phases = {name: value for name, value in scraped.items() if name.startswith("seesaw_phase{")}
    assert sum(phases.values()) == phases['seesaw_phase{phase="decode"}'] == 1
    assert 0 < scraped["seesaw_output_tokens_total"] < stats.output_tokens
    assert 0 < scraped["seesaw_prompt_tokens_total"] <= stats.prompt_tokens
    assert scraped["seesaw_host_kv_budget_bytes"] == 1 << 20
    assert 0 < scraped["seesaw_device_kv_used_bytes"] <= scraped["seesaw_device_kv_pool_bytes"]
    assert 0 < scraped['seesaw_swapped_bytes_total{direction="out"}'] <= stats.swapped_out_bytes
    assert scraped["seesaw_transitions_total"] >= 1
    assert scraped["seesaw_rank_losses_total"] == 0
    assert scraped['seesaw_plan_info{plan="P2->T2"}'] == 1


def test_events_are_sent_in_batches() -> None:
    sent: list[Events] = []
    trace = RankTrace(0, sent.append)
    trace.copied("swap-in", 5, 0.5)
    trace.flush()
    trace.flush()
    assert [[(e.name, e.bytes, e.rank) for e in message.events] for message in sent] == [[("swap-in", 5, 0)]]
    for _ in range(1000):
        trace.copied("swap-in", 5, 0.0)
    trace.flush()
    assert max(len(message.events) for message in sent) <= 200
    assert sum(len(message.events) for message in sent) == 1001
