"""Sampling on a GPU: nothing waits, and tokens are those of a CPU. Run with `TRITON_INTERPRET=0 pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests import triton_interpreter  # before any module of kernels
from tests.checkpoints import make_checkpoint
from tests.execution.sampled import state
from tests.execution.test_sampling_behind import KINDS
from tests.execution.test_stage import ROWS, prefill, stages

from seesaw.core.actions import FEEDBACK  # isort: skip
from seesaw.device.cpu import CpuDevice  # isort: skip
from seesaw.device.cuda import CudaDevice  # isort: skip
from seesaw.execution.sampling import Sampler, SampleResult  # isort: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB, BATCH, STEPS = 32_000, 64, 20


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def opened(device: CpuDevice | CudaDevice, changes: dict[str, Any]) -> Sampler:
    sampler = Sampler(VOCAB, None, device)
    for slot in range(BATCH):
        sampler.open(slot, state(noise_key=977 * slot, **changes))
    return sampler


@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_chooses_what_a_cpu_chooses_and_nothing_waits(name: str) -> None:
    """Greedy choices exactly; of drawn ones all but a few, since exponentials differ in their last bits."""
    changes, gpu = KINDS[name], CudaDevice("cuda:0")
    samplers = opened(CpuDevice(), changes), opened(gpu, changes)
    generator, slots = torch.Generator().manual_seed(0), list(range(BATCH))
    logits = [torch.randn(BATCH, VOCAB, generator=generator) * 2 for _ in range(4)]
    there = [one.to(gpu.torch) for one in logits]
    expected, found = list[SampleResult](), list[SampleResult]()
    found.append(samplers[1].sample(there[0], slots))  # makes ready what waits once
    with no_waiting():
        for step in range(1, STEPS):
            found.append(samplers[1].sample(there[step % 4], slots))
        tables = [one.logprobs.download(gpu) if one.logprobs else None for one in found]
    gpu.compute.record().wait()
    expected = [samplers[0].sample(logits[step % 4], slots) for step in range(STEPS)]
    same = torch.stack([one.tokens for one in expected]) == torch.stack([one.tokens.cpu() for one in found])
    if changes.get("temperature") == 0.0:
        assert same.all()
    elif "prompt" in changes:  # what differs once goes on differing, by the sequence's history
        assert same[0].float().mean() > 0.95
    else:
        assert same.float().mean() > 0.98
    for one, table in zip(expected, tables, strict=True):
        assert (one.logprobs is None) == (table is None)
        if one.logprobs is None or table is None or not same.all():
            continue
        for wanted, entry in zip(one.logprobs.listed(), table.listed(), strict=True):
            assert wanted is not None and entry is not None and entry.rank == wanted.rank
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [p for _, p in entry.top] == pytest.approx([p for _, p in wanted.top], abs=1e-4)
    gpu.close()


@pytest.mark.skipif(triton_interpreter.INTERPRETING, reason="needs TRITON_INTERPRET=0")
def test_a_stage_launches_its_steps_without_waiting(tmp_path: Path) -> None:
    """Prompts and the steps that follow them, each launched before the one before has been reported."""
    path = make_checkpoint(tmp_path, "llama", num_hidden_layers=2, vocab_size=251, head_dim=16)
    answers = []
    for device in (None, CudaDevice("cuda:0")):
        (stage,) = stages(path, 1, device)
        forwards = [prefill()]
        for number in range(2, 8):
            forwards.append(
                msgspec.structs.replace(
                    prefill(),
                    id=number,
                    starts=[number + 1] * ROWS,
                    counts=[1] * ROWS,
                    tokens=[FEEDBACK] * ROWS,
                    open=[],
                    feedback_from=number - 1,
                )
            )
        reports = [
            stage.run(forward, None) for forward in forwards[:4]
        ]  # kernels are compiled, memory is taken
        if device is None:
            reports += [stage.run(forward, None) for forward in forwards[4:]]
        else:
            with no_waiting():
                reports += [stage.run(forward, None) for forward in forwards[4:]]
            device.compute.record().wait()
        answers.append([report() for report in reports if report is not None])
        stage.finish()
        if device is not None:
            device.close()
    greedy = [slot for slot in range(ROWS) if slot != 1]  # the row that is drawn may differ in its last bits
    for one, other in zip(*answers, strict=True):
        assert [one.tokens[slot] for slot in greedy] == [other.tokens[slot] for slot in greedy]
        assert [entry is None for entry in one.logprobs] == [entry is None for entry in other.logprobs]
