"""A stage samples in chunks of rows, and gets what it would get from all of them at once."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesaw.attention.select import create_attention
from seesaw.core.actions import Forward as ForwardAction
from seesaw.core.actions import ForwardDone, SamplingState, SlotInit
from seesaw.core.layout import Layout
from seesaw.device.base import Device
from seesaw.device.select import open_device
from seesaw.execution import stage as stage_module
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.sampling import SampleResult
from seesaw.execution.stage import Stage
from seesaw.kv.device_pool import DevicePool
from seesaw.models.hf_config import load_spec
from seesaw.ops.select import create_operators
from seesaw.ops.torch_ops import TorchOperators
from seesaw.transport.base import Members
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import make_sharding, rank_view
from seesaw.weights.store import HostWeightStore
from tests.checkpoints import make_checkpoint

ROWS = 7
RANDOM = SamplingState(0.8, 0.9, 0, 0.0, 1.0, 0.5, 0.0, 11, -1, 0, [], 0, [1, 2], [])
ASKING = SamplingState(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 12, 2, 0, [], 0, [], [])


class _Threads:
    """A transport between threads: every call is answered by the first member, who hears all."""

    name = "threads"

    def __init__(self, rank: int, boxes: list[list[queue.Queue[Tensor]]]) -> None:
        self._rank, self._boxes = rank, boxes

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        self.send(x, members[0], 0)
        if self._rank != members[0]:
            return None
        return [self._boxes[member][self._rank].get(timeout=20) for member in members]

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        if self._rank == members[0]:
            for member in members:
                self.send(x, member, 0)
        return self.receive(x, members[0], 0)

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        parts = self.gather(x, members)
        return self.broadcast(x if parts is None else x.copy_(torch.stack(parts).sum(dim=0)), members)

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        self._boxes[self._rank][rank].put(x.clone())

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        return x.copy_(self._boxes[rank][self._rank].get(timeout=20))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2, vocab_size=251)


def stages(checkpoint: Path, tp: int, device: Device | None = None) -> list[Stage]:
    """A rank each of a layout of one stage, all on one device: a CPU, or with what is chosen for another."""
    spec = load_spec(checkpoint)
    sharding = make_sharding(spec, Layout(tp=tp), head_weight=1.0)
    views = [rank_view(spec, sharding, rank) for rank in range(tp)]
    boxes: list[list[queue.Queue[Tensor]]] = [[queue.Queue() for _ in range(tp)] for _ in range(tp)]
    made = []
    device = device or open_device("cpu")
    behind = device.runs_behind
    attention = create_attention(
        device.name, None if behind else "torch", head_dim=spec.head_dim, dtype=torch.float32
    )
    operators = create_operators(device.name, dtype=torch.float32) if behind else TorchOperators()
    for view in views:
        weights = RankWeights(
            spec, HostWeightStore.open(checkpoint, spec), "float32", view.rank, device=device
        )
        weights.load(sharding)
        pool = DevicePool(8 << 20, device.torch)
        pool.view(ROWS, len(view.layers), len(view.kv_heads), 16, spec.head_dim, torch.float32)
        made.append(
            Stage(
                spec=spec,
                view=view,
                vocab_widths=[len(other.vocab) for other in views],
                weights=weights.tensors,
                dtype=torch.float32,
                group=TensorParallelGroup(view, _Threads(view.rank, boxes)),
                pool=pool,
                attention=attention,
                operators=operators,
                block_size=16,
                device=device,
            )
        )
    return made


def prefill() -> ForwardAction:
    """`ROWS` prompts: one row drawn at random, one that asks for log-probabilities, the others plain."""
    kinds = {1: RANDOM, 5: ASKING}
    return ForwardAction(
        id=1,
        replica=0,
        slots=list(range(ROWS)),
        starts=[0] * ROWS,
        counts=[3] * ROWS,
        tokens=[(7 * i) % 50 for i in range(3 * ROWS)],
        sampled=list(range(ROWS)),
        open=[SlotInit(slot, [slot], kinds.get(slot)) for slot in range(ROWS)],
        close=[],
        new_blocks=[],
        write_through=[],
        feedback=True,
        feedback_from=-1,
    )


def run(made: list[Stage]) -> ForwardDone:
    with ThreadPoolExecutor(len(made)) as threads:
        reports = list(threads.map(lambda one: one.run(prefill(), None), made))
    assert reports[1:] == [None] * (len(made) - 1)
    assert reports[0] is not None
    return reports[0]()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_of_rows_sample_what_all_rows_sample(
    checkpoint: Path, tp: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(stages(checkpoint, tp))
    seen: list[int] = []
    plain = stage_module.Decoder.logits
    monkeypatch.setattr(stage_module, "logit_rows", lambda vocab: rows)
    monkeypatch.setattr(
        stage_module.Decoder, "logits", lambda self, hidden: seen.append(len(hidden)) or plain(self, hidden)
    )
    parts = run(stages(checkpoint, tp))
    assert len(seen) == tp * -(-ROWS // rows) and max(seen) == rows
    assert parts.tokens == whole.tokens and len(whole.tokens) == ROWS
    assert [one is not None for one in parts.logprobs] == [slot == 5 for slot in range(ROWS)]
    assert parts.logprobs[5] is not None and whole.logprobs[5] is not None
    assert parts.logprobs[5].logprob == pytest.approx(whole.logprobs[5].logprob, abs=1e-5)
    assert [token for token, _ in parts.logprobs[5].top] == [token for token, _ in whole.logprobs[5].top]


def test_joined_results_keep_their_rows() -> None:
    tokens = [torch.tensor([3, 1]), torch.tensor([4])]
    none = SampleResult.joined([SampleResult(tokens[0], None), SampleResult(tokens[1], None)])
    assert none.tokens.tolist() == [3, 1, 4] and none.logprobs is None
