"""The engine on a GPU: answers, re-sharding between ranks that share one, and copies that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seesaw import LLM, SamplingParams
from seesaw.attention.select import create_attention
from seesaw.core.actions import FEEDBACK, Forward, SlotInit
from seesaw.core.layout import Layout
from seesaw.device.base import CaptureError
from seesaw.device.cuda import CudaDevice
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.graphs import VARIABLE, RankGraphs
from seesaw.execution.stage import Stage
from seesaw.kv.copy_engine import CopyEngine
from seesaw.kv.device_pool import DevicePool
from seesaw.models.hf_config import load_spec
from seesaw.ops.select import create_operators
from seesaw.transport.select import SingleTransport
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import make_sharding, rank_view
from seesaw.weights.store import HostWeightStore
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
        copies.fence()
        device.compute.record().wait()
        assert torch.equal(host, changed.cpu())
        torch.cuda._sleep(cycles)
        pool.zero_()
        copies.to_device(back, lambda moved, _: done.append(moved))
        copies.fence()
        device.compute.record().wait()
        assert torch.equal(pool, changed)
    device.close()
    assert done == [size] * 6


def test_copies_go_on_beside_computation() -> None:
    """By events: a copy that was launched behind little work ends before the long work that follows it."""
    device = CudaDevice("cuda:0")
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    pool = torch.ones(64 << 20, dtype=torch.uint8, device=device.torch)
    copies = CopyEngine(device)
    copies.fence()
    device.compute.record().wait()
    start = device.compute.record()
    copies.to_host(lambda: host.copy_(pool, non_blocking=True).numel())
    copied = device.to_host.record()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    computed = device.compute.record()
    computed.wait()
    copied.wait()
    assert copied.seconds_since(start) < 0.5 * computed.seconds_since(start)
    device.close()


def steps_of(path: Path, device: CudaDevice) -> tuple[Stage, list[Forward]]:
    """A stage of the whole model over a pool of its own, and decode steps of four sequences, each fed by the last."""
    spec, sharding = load_spec(path), make_sharding(load_spec(path), Layout())
    view, count, blocks = rank_view(spec, sharding, 0), 4, 8
    weights = RankWeights(spec, HostWeightStore.open(path, spec), "float32", 0, device=device)
    weights.load(sharding)
    pool = DevicePool(64 << 20, device.torch)
    pool.view(count * blocks, spec.layers, spec.kv_heads, 16, spec.head_dim, torch.float32)
    graphs = RankGraphs(
        device, most=16, blocks=blocks, block_size=16, hidden=spec.hidden, dtype=torch.float32, keep=False
    )
    stage = Stage(
        spec=spec,
        view=view,
        vocab_widths=[spec.vocab],
        weights=weights.tensors,
        dtype=torch.float32,
        group=TensorParallelGroup(view, SingleTransport()),
        pool=pool,
        attention=create_attention(device.name, "triton", head_dim=spec.head_dim, dtype=torch.float32),
        operators=create_operators(device.name, dtype=torch.float32),
        block_size=16,
        device=device,
        graphs=graphs,
    )
    opened = [SlotInit(i, list(range(i * blocks, (i + 1) * blocks)), None) for i in range(count)]
    forwards = [
        Forward(
            id=number,
            replica=0,
            slots=list(range(count)),
            starts=[number] * count,
            counts=[1] * count,
            tokens=[FEEDBACK if number else 5 + i for i in range(count)],
            sampled=list(range(count)),
            open=[] if number else opened,
            close=[],
            new_blocks=[],
            write_through=[],
            feedback=True,
            feedback_from=number - 1,
        )
        for number in range(24)
    ]
    return stage, forwards


def test_no_decode_step_waits_for_the_device(tmp_path: Path) -> None:
    """With graphs, once they are captured: torch raises at whatever would."""
    device = CudaDevice("cuda:0")
    stage, forwards = steps_of(make_checkpoint(tmp_path, "llama", head_dim=16), device)
    tokens: list[list[int]] = []
    for forward in forwards:
        warm = forward.id >= 12  # pinned memory has been made for as many steps as are under way
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            done = stage.run(forward, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert done is not None
        device.compute.record().wait()
        tokens.append(done().tokens)
    assert len(tokens) == 24 and stage._graphs is not None and set(stage._graphs._graphs) == {4, 16}
    plain, _ = steps_of(make_checkpoint(tmp_path, "llama", head_dim=16), device)
    plain._graphs = None
    for forward, expected in zip(forwards, tokens, strict=True):
        done = plain.run(forward, None)
        assert done is not None
        device.compute.record().wait()
        assert done().tokens == expected
    stage.finish()
    device.close()


@pytest.mark.parametrize("plan", ["T1", "T1->T1"])
def test_graphs_give_the_tokens_of_steps_without(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that shrink, sequences of every length."""
    path = make_checkpoint(tmp_path, "qwen3", head_dim=16, max_position_embeddings=1024)
    prompts, expected = clear_prompts(path, LENGTHS, NEW_TOKENS)
    options: dict[str, Any] = {"device": "cuda", "device_memory": "2GiB", "host_kv": "64MiB", "plan": plan}
    assert tokens(path, prompts, **options)[0] == expected
    monkeypatch.setenv(VARIABLE, "0")
    assert tokens(path, prompts, **options)[0] == expected


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    """What waits for the device cannot be captured: torch's words are kept, and work goes on, also in new graphs."""
    device = CudaDevice("cuda:0")
    x = torch.ones(8, device=device.torch)

    def waiting() -> None:
        x.add_(x.sum().item())

    with pytest.raises(CaptureError, match="captur"):
        device.graph_pool().capture(waiting)
    assert torch.cuda.current_stream() == device.compute.native
    x.fill_(1)
    graph = device.graph_pool().capture(lambda: x.mul_(2))  # done once
    assert x.tolist() == [2.0] * 8
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [16.0] * 8
    device.close()
