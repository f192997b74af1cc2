"""Memory of the control process and of the ranks over long jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from seesaw import LLM, Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.test_lifecycle import workers_of


def resident(pids: list[int]) -> int:
    """Private memory of these processes together, in bytes."""
    return sum(psutil.Process(pid).memory_full_info().uss for pid in pids)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_job_keeps_memory_flat(tmp_path: Path) -> None:
    """200,000 short rows: what is resident at the end is what was resident at half-time."""
    rows = 200_000
    path = make_checkpoint(tmp_path, "llama", num_hidden_layers=2, hidden_size=48, intermediate_size=64)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    def requests() -> Iterator[Request]:
        for i in range(rows):
            yield Request(id=str(i), prompt_token_ids=(1 + i % 200, 2, 3), sampling=params)

    with LLM(path, plan="D2->D2", load_format="dummy", host_kv="8MiB", device_memory="32MiB") as llm:
        pids = [os.getpid(), *(p.pid for p in workers_of(os.getpid()))]
        half = done = 0
        for done, _ in enumerate(llm.run(requests()), 1):
            if done == rows // 2:
                half = resident(pids)
        assert done == rows
        assert resident(pids) <= half * 1.02 + (4 << 20)


def test_budgets_bound_what_is_allocated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights, workspace and pool of each rank fit the budget and are logged; the host buffer has its exact size."""
    caplog.set_level(logging.INFO, logger="seesaw.launch")
    path = make_checkpoint(tmp_path, "qwen3")
    budget = 8 << 20
    with LLM(path, plan="P2->T2", dtype="float32", device_memory=budget, host_kv="1MiB", chunk=64) as llm:
        memory, spec = llm.deployment.memory, llm.deployment.spec
        for weights, workspace, pool in zip(memory.weights, memory.workspace, memory.pool, strict=True):
            assert weights + workspace + pool <= budget
        block = spec.kv_bytes_per_token("float32") * 16
        assert memory.host_blocks == (1 << 20) // block
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    says = f"memory of rank {memory.fullest}, the fullest, within 8.00 MiB: {memory.describe(memory.fullest)}"
    assert says in caplog.text and "KV pool" in says and "activations" in says
