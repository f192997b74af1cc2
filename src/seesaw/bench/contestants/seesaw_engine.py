"""Seesaw as a contestant (`python -m seesaw.bench.contestants.seesaw_engine`). Options are those of `LLM`."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from seesaw import LLM, SamplingParams, __version__
from seesaw.bench.contestants.service import Measured, serve
from seesaw.core.stats import EngineStats


class SeesawEngine:
    """See `service.ServedEngine`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import torch

        self._llm = LLM(model, load_format="dummy", tokenizer=False, **options)
        self.about = {"seesaw": __version__, "torch": torch.__version__, **describe(self._llm)}

    def run(self, prompts: list[list[int]], outputs: list[int]) -> Measured:
        """See `service.ServedEngine.run`."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        before = self._llm.stats()
        started = time.perf_counter()
        answers = list(self._llm.generate(requests, params))
        seconds = time.perf_counter() - started
        counts = [len(answer.outputs[0].token_ids) for answer in answers]
        details = difference(before, self._llm.stats())
        return Measured(seconds, counts, details | {"engine": describe(self._llm)})

    def close(self) -> None:
        """See `service.ServedEngine.close`."""
        self._llm.close()


def describe(llm: LLM) -> dict[str, Any]:
    """The plan that was resolved, with its memory."""
    deployment = llm.deployment
    memory = deployment.memory
    return {
        "plan": str(deployment.plan),
        "policy": deployment.scheduler.policy,
        "dtype": deployment.dtype,
        "chunk": deployment.scheduler.max_batch_tokens,
        "max_running": deployment.scheduler.max_running,
        "block_size": deployment.scheduler.block_size,
        "device_memory": deployment.device_memory,
        "device_blocks": list(memory.device_blocks),
        "host_blocks": memory.host_blocks,
        "transition": memory.mode if deployment.plan.reshards else None,
        "max_model_len": memory.max_model_len,
        "stages": [[len(stage) for stage in s.stages] for s in deployment.shardings],
        "carried": [list(sharding.carried) for sharding in deployment.shardings],
    }


_COUNTS = ("swapped_out_bytes", "swapped_in_bytes", "preemptions_swapped", "preemptions_recomputed")
_BY_PHASE = ("seconds_per_phase", "steps", "phase_tokens", "host_seconds", "rank_host_seconds")


def difference(before: EngineStats, after: EngineStats) -> dict[str, Any]:
    """What an engine did between two snapshots of its statistics."""
    details: dict[str, Any] = {name: getattr(after, name) - getattr(before, name) for name in _COUNTS}
    for name in _BY_PHASE:
        old, new = getattr(before, name, {}), getattr(after, name, {})
        details[name] = {key: value - old.get(key, 0) for key, value in new.items()}
    details["transitions"] = [
        dataclasses.asdict(record) for record in after.transitions[len(before.transitions) :]
    ]
    return details


if __name__ == "__main__":
    sys.exit(serve(SeesawEngine))
