"""The engine on a GPU: answers, re-sharding between ranks that share one, and copies that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seesaw import LLM, SamplingParams
from seesaw.device.cuda import CudaDevice
from seesaw.kv.copy_engine import CopyEngine
from tests.checkpoints import FAMILIES, clear_prompts, make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (1, 2, 16, 17, 31, 64, 65, 129, 200)
NEW_TOKENS = 24


def tokens(path: Path, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], int]:
    """Greedy continuations, and the number of transitions."""
    given: dict[str, Any] = {"dtype": "float32", "tokenizer": False, "max_model_len": 320, "max_running": 16}
    with LLM(path, **given | options) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [list(output.outputs[0].token_ids) for output in outputs], len(llm.stats().transitions)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_float32_equals_transformers(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family, max_position_embeddings=1024)
    prompts, expected = clear_prompts(path, LENGTHS, NEW_TOKENS)
    options: dict[str, Any] = {"device": "cuda", "device_memory": "2GiB", "host_kv": "64MiB"}
    for plan in ("T1", "T1->T1"):
        assert tokens(path, prompts, plan=plan, **options)[0] == expected, plan


@pytest.mark.parametrize(("plan", "ranks"), [("P2->T2", 2), ("P4->T4", 4)])
@pytest.mark.parametrize("transition", ["delta", "resident", "reload"])
def test_ranks_that_share_a_gpu_change_layouts(
    plan: str, ranks: int, transition: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, "llama", head_dim=16, max_position_embeddings=1024)
    prompts, _ = clear_prompts(path, LENGTHS, NEW_TOKENS)
    options: dict[str, Any] = {"plan": plan, "transition": transition, "host_kv": "64MiB"}
    expected, _ = tokens(path, prompts, device="cpu", device_memory="64MiB", **options)
    found, changes = tokens(
        path, prompts, device="cuda", ranks_per_gpu=ranks, device_memory="2GiB", **options
    )
    assert found == expected
    assert changes >= 1


def test_a_round_trip_is_exact_behind_stalled_streams() -> None:
    """Writes that come late on the compute stream, on its way out and on its way back: nobody may overtake them."""
    device = CudaDevice("cuda:0")
    copies = CopyEngine(device)
    size, cycles = 32 << 20, 200_000_000
    wanted = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device.torch)
    pool = torch.zeros_like(wanted)
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def out() -> int:
        host.copy_(pool, non_blocking=True)
        return size

    def back() -> int:
        pool.copy_(host, non_blocking=True)
        return size

    done: list[int] = []
    for turn in range(3):
        changed = wanted + turn
        torch.cuda._sleep(cycles)
        pool.copy_(changed)
        copies.to_host(out, lambda moved, _: done.append(moved))
        copies.drain()
        assert torch.equal(host, changed.cpu())
        torch.cuda._sleep(cycles)
        pool.zero_()
        copies.to_device(back, lambda moved, _: done.append(moved))
        copies.drain()
        assert torch.equal(pool, changed)
    device.close()
    assert done == [size] * 6


def test_copies_go_on_beside_computation() -> None:
    """By events: a copy that was launched behind little work ends before the long work that follows it."""
    device = CudaDevice("cuda:0")
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    pool = torch.ones(64 << 20, dtype=torch.uint8, device=device.torch)
    copies = CopyEngine(device)
    copies.drain()
    start = device.compute.record()
    copies.to_host(lambda: host.copy_(pool, non_blocking=True).numel())
    copied = device.to_host.record()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    computed = device.compute.record()
    computed.wait()
    copied.wait()
    assert copied.seconds_since(start) < 0.5 * computed.seconds_since(start)
    device.close()
