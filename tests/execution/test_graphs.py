"""Decode graphs without a device: what is put in for a step, and which Forwards they serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.core.actions import FEEDBACK, Forward, SlotInit
from seesaw.core.errors import ConfigError
from seesaw.core.workspace import graph_batches
from seesaw.device.cpu import CpuDevice
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.graphs import VARIABLE, DecodeGraphs, RankGraphs, StaticInputs
from seesaw.execution.slots import Inputs, SlotTables
from seesaw.transport.select import SingleTransport

BLOCK = 4
LENGTHS = [1, 4, 5, 17, 8]
"""Tokens that the sequences have, beside the new one."""


def step(count: int = len(LENGTHS), **changes: Any) -> Forward:
    """A decode step; it opens its slots, which are not in the order of its sequences."""
    slots = [3, 0, 4, 1, 7][:count] + list(range(8, 8 + max(0, count - 5)))
    lengths = (LENGTHS * (1 + count // 5))[:count]
    blocks = [list(range(10 * i + 1, 10 * i + 2 + length // BLOCK)) for i, length in enumerate(lengths)]
    given = {
        "id": 2,
        "replica": 0,
        "slots": slots,
        "starts": lengths,
        "counts": [1] * count,
        "tokens": [50 + i for i in range(count)],
        "sampled": list(range(count)),
        "open": [SlotInit(slot, own, None) for slot, own in zip(slots, blocks, strict=True)],
        "close": [],
        "new_blocks": [],
        "write_through": [],
        "feedback": True,
        "feedback_from": -1,
    }
    return Forward(**given | changes)


class Pool:
    """Graphs that do what they hold when they are replayed."""

    bytes = 0

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed = 0

    def capture(self, work: Any) -> Any:
        work()
        self.captured.append(1)
        return SimpleNamespace(replay=lambda: (work(), setattr(self, "replayed", self.replayed + 1)))


class CapturingDevice(CpuDevice):
    """A device on the host that has graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()

    def graph_pool(self) -> Any:
        return self.pool


def rank_graphs(device: CpuDevice, *, most: int = 16, keep: bool = False) -> RankGraphs:
    return RankGraphs(device, most=most, blocks=8, block_size=BLOCK, hidden=3, dtype=torch.float32, keep=keep)


def group(tp: int = 1, **transport: bool) -> TensorParallelGroup:
    view: Any = SimpleNamespace(tp_ranks=tuple(range(tp)), first_stage=True)
    link: Any = SimpleNamespace(**transport) if transport else SingleTransport()
    return TensorParallelGroup(view, link)


def decode_graphs(device: CapturingDevice, seen: list[Inputs], **options: Any) -> DecodeGraphs:
    """Over layers whose hidden states are the tokens."""

    def layers(inputs: Inputs, received: Tensor | None) -> Tensor:
        seen.append(inputs)
        return inputs.tokens[:, None].expand(-1, 3).float()

    graphs = rank_graphs(device, **options).of(layers, group(), attention_capturable=True)
    assert graphs is not None
    return graphs


@pytest.mark.parametrize("size", [5, 8, 16])
@pytest.mark.parametrize("before", [0, 16])
def test_a_step_has_the_inputs_it_has_without_a_graph(size: int, before: int) -> None:
    """Whatever the memory held before; and padding reads and writes nothing."""
    device = CpuDevice()
    tables = SlotTables(BLOCK, device)
    static = StaticInputs(device, 16, 8, 3, torch.float32, BLOCK)
    if before:
        other = step(before)
        tables.update(other)
        tables.fill(other, static, 16, tokens=True)
    forward = step()
    tables.update(forward)
    plain = tables.inputs(forward)
    tables.fill(forward, static, size, tokens=True)
    found, count = static.inputs(size), len(LENGTHS)
    assert torch.equal(found.tokens[:count], plain.tokens)
    assert torch.equal(found.positions[:count], plain.positions)
    for name in ("context_starts", "slot_mapping"):
        assert torch.equal(getattr(found.attention, name)[:count], getattr(plain.attention, name)), name
    assert torch.equal(found.attention.query_starts[: count + 1], plain.attention.query_starts)
    width = plain.attention.block_tables.shape[1]
    assert torch.equal(found.attention.block_tables[:count, :width], plain.attention.block_tables)
    assert found.attention.block_tables.shape == (size, 8)
    assert found.attention.query_starts[count:].tolist() == [count] * (size - count + 1)
    assert found.attention.slot_mapping[count:].tolist() == [-1] * (size - count)
    for padding in (found.tokens, found.positions, found.attention.context_starts):
        assert not padding[count:].any()
    assert found.sampled_rows is None and found.attention.padded and not found.attention.fresh


@pytest.mark.parametrize("size", [1, 2, 3, 8, 200])
def test_a_batch_of_padding(size: int) -> None:
    """What a capture is made with; every field can be read in vectors."""
    static = StaticInputs(CpuDevice(), 200, 4, 3, torch.float32, BLOCK)
    static._words.fill_(77)
    static.clear(size)
    found = static.inputs(size)
    assert found.attention.query_starts.tolist() == [0] * (size + 1)
    assert found.attention.slot_mapping.tolist() == [-1] * size
    base = static._words.data_ptr()
    fields = (found.tokens, found.positions, found.attention.slot_mapping, found.attention.context_starts)
    assert all((field.data_ptr() - base) % 16 == 0 for field in (*fields, found.attention.query_starts))


def test_tokens_that_are_fed_back_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when their table has moved since, and only where somebody reads them."""
    device = CpuDevice()
    tables, static = SlotTables(BLOCK, device), StaticInputs(device, 16, 8, 3, torch.float32, BLOCK)
    forward = step(tokens=[FEEDBACK, 7, FEEDBACK, FEEDBACK, 9], feedback_from=1)
    tables.update(forward)
    tables.set_latest(forward.slots, torch.tensor([90, 91, 92, 93, 94]))
    tables.update(step(16, slots=list(range(40, 56)), open=[SlotInit(40 + i, [i], None) for i in range(16)]))
    tables.fill(forward, static, 8, tokens=True)
    assert static.inputs(8).tokens.tolist() == [90, 7, 92, 93, 9, 0, 0, 0]
    tables.fill(forward, static, 8, tokens=False)
    assert static.inputs(8).tokens.tolist() == [FEEDBACK, 7, FEEDBACK, FEEDBACK, 9, 0, 0, 0]


def test_the_largest_is_captured_first_and_others_when_they_are_needed() -> None:
    device, seen = CapturingDevice(), list[Inputs]()
    graphs, tables = decode_graphs(device, seen), SlotTables(BLOCK, device)
    for count in (3, 5, 4, 16, 9):
        forward = step(count)
        tables.update(forward)
        found = graphs.prepare(forward, tables)
        assert found is not None and found.hidden.shape == (count, 3)
        assert found.run()[:, 0].tolist() == [50 + i for i in range(count)]
    sizes = [len(inputs.tokens) for inputs in seen]
    assert sizes == [16, 4, 4, 8, 8, 4, 16, 16]  # captures of 16, 4 and 8, and a replay each
    assert device.pool.replayed == 5 and len(device.pool.captured) == 3


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"counts": [2, 1, 1, 1, 1], "tokens": [1, 2, 3, 4, 5, 6]}, 5),
        ({"write_through": [(1, 1)]}, 5),
        ({"sampled": [0, 1, 3, 4]}, 5),
        ({}, 17),
    ],
)
def test_other_forwards_run_as_they_are(changes: dict[str, Any], count: int) -> None:
    device = CapturingDevice()
    graphs = decode_graphs(device, [])
    assert graphs.prepare(step(count, **changes), SlotTables(BLOCK, device)) is None
    assert not device.pool.captured


def test_batches_beyond_the_ladder_run_as_they_are() -> None:
    device = CapturingDevice()
    graphs, tables = decode_graphs(device, [], most=4000), SlotTables(BLOCK, device)
    assert graph_batches(4000)[-1] == 1024
    assert graphs.prepare(step(1025), tables) is None


def test_who_has_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not CPU ranks, nor a group whose transport passes through the host; graphs are kept where weights are."""

    def layers(inputs: Inputs, received: Tensor | None) -> Tensor:
        raise AssertionError

    assert rank_graphs(CpuDevice()).of(layers, group(), attention_capturable=True) is None
    device = CapturingDevice()
    for tp, capturable, expected in ((1, False, True), (2, False, False), (2, True, True)):
        found = rank_graphs(device).of(layers, group(tp, capturable=capturable), attention_capturable=True)
        assert (found is not None) == expected
    ours = rank_graphs(device)
    assert ours.of(layers, group(), attention_capturable=True) is not ours.of(
        layers, group(), attention_capturable=True
    )
    kept = rank_graphs(device, keep=True)
    assert kept.of(layers, group(), attention_capturable=True) is kept.of(
        layers, group(), attention_capturable=True
    )


def test_a_backend_that_cannot_be_captured_is_not_asked_to_be() -> None:
    device = CapturingDevice()
    graphs = rank_graphs(device).of(lambda *_: torch.zeros(0), group(), attention_capturable=False)
    assert graphs is not None
    assert graphs.prepare(step(), SlotTables(BLOCK, device)) is None
    assert not device.pool.captured


def test_a_wrong_setting_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(ConfigError, match="SEESAW_CUDA_GRAPHS='off': 0 is for decode steps without CUDA"):
        rank_graphs(CpuDevice())
