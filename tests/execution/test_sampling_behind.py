"""Sampling on a device that runs behind: nothing is asked of it, and it chooses what a CPU chooses."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seesaw.device.cpu import CpuDevice
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.sampling import Sampler, SampleResult, drawing, histories, logprobs
from seesaw.execution.sampling import sampler as module
from seesaw.execution.sampling.rows import Uploads
from tests.execution.sampled import Behind, Empty, any_state, guarded, state

torch.set_num_threads(1)

ROWS, VOCAB = 12, 1000
KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "min_p": {"min_p": 0.1},
    "top_k": {"top_k": 12, "min_p": 0.01},
    "large_top_k": {"top_k": 900},
    "top_p": {"top_p": 0.8},
    "both": {"top_k": 20, "top_p": 0.7},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "prompt": list(range(100))},
    "early": {"min_tokens": 5, "stop_token_ids": [1, 2], "temperature": 0.0},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "chosen": {"logprobs": 0},
}


def kind(number: int) -> dict[str, Any] | None:
    """Of row `number` of a batch of all kinds, the last plain."""
    return [*KINDS.values(), None][number % (len(KINDS) + 1)]


def run(
    sampler: Sampler, logits: Tensor, states: list[dict[str, Any] | None], steps: int = 3
) -> SampleResult:
    """Some steps of a batch, with a slot that ends and one that begins."""
    for slot, changes in enumerate(states):
        sampler.open(slot, None if changes is None else state(noise_key=slot, **changes))
    for _ in range(steps):
        sampler.sample(logits, list(range(len(states))))
    sampler.close(3)
    sampler.open(3, state(repetition_penalty=2.0, prompt=[4] * 200))
    return sampler.sample(logits, list(range(len(states))))


# ---- nothing is asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "mixed"])
@pytest.mark.parametrize("chunk", [1 << 20, 5 * VOCAB])
def test_nothing_is_asked_and_one_upload_serves_a_call(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device hold nothing here, so whatever asks for what they hold fails."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    device = Empty()
    states = [kind(row) if name == "mixed" else KINDS[name] for row in range(ROWS)]
    logits = torch.empty(ROWS, VOCAB, dtype=torch.bfloat16, device="meta")
    with guarded():
        result = run(Sampler(VOCAB, None, device), logits, states)
    assert result.tokens.shape == (ROWS,) and result.tokens.dtype == torch.int64 and result.tokens.is_meta
    assert device.uploads == 4
    if result.logprobs is not None:
        asking = sum(
            changes is not None and "logprobs" in changes and row != 3 for row, changes in enumerate(states)
        )
        ((asks, table),) = result.logprobs.parts
        assert table is not None and table.is_meta and len(table) == asking == (asks >= 0).sum()


def test_plain_rows_and_the_best_of_several_ranks_ask_nothing() -> None:
    class Gathers:
        def gather(self, x: Tensor, members: tuple[int, ...]) -> list[Tensor]:
            return [x] * len(members)

    class View:
        tp_ranks = (0, 1)

    group = TensorParallelGroup(View(), Gathers())  # type: ignore[arg-type]
    local = torch.empty(ROWS, VOCAB, device="meta")
    with guarded():
        best = local.argmax(dim=-1)
        chosen = group.gather_best(local.gather(1, best[:, None])[:, 0], best + 7)
        whole = group.gather_logits(local[:, :-1], [VOCAB, VOCAB - 1])
        sampler = Sampler(VOCAB, None, Empty())
        sampler.open(0, None)
        assert sampler.sample(local[:1], [0]).tokens.shape == (1,)
    assert chosen is not None and chosen.shape == (ROWS,) and chosen.dtype == torch.int64
    assert whole is not None and whole.shape == (ROWS, 2 * VOCAB - 1)


ASKING: dict[str, Callable[[Tensor], object]] = {
    "any": lambda x: bool((x > 0).any()),
    "item": lambda x: x.sum().item(),
    "max": lambda x: int(x.max()),
    "list": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device="meta")),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: torch.repeat_interleave(x[0].long()),
    "download": lambda x: x.cpu(),
    "upload": lambda x: torch.ones(3).to(x.device),
    "literal": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "index by lists": lambda x: x[[0, 1], [1, 2]],
    "index of the host": lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", ASKING)
def test_the_guard_finds_what_asks(name: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), guarded():
        ASKING[name](torch.empty(4, 4, device="meta"))


def asks_whether_rows_have_a_min_p(patch: pytest.MonkeyPatch) -> None:
    whole = drawing.Parameters.weigh_

    def weigh_(self: drawing.Parameters, scores: Tensor) -> Tensor:
        assert bool((self.temperature > 0).all())
        return whole(self, scores)

    patch.setattr(drawing.Parameters, "weigh_", weigh_)


def asks_for_the_token_of_a_history(patch: pytest.MonkeyPatch) -> None:
    whole = histories.Penalties.advance

    def advance(self: histories.Penalties, tokens: Tensor) -> None:
        whole(self, tokens)
        tokens.tolist()

    patch.setattr(histories.Penalties, "advance", advance)


def uploads_each_array_by_itself(patch: pytest.MonkeyPatch) -> None:
    def add(self: Uploads, array: np.ndarray[Any, Any]) -> Callable[[], Tensor]:
        tensor = torch.from_numpy(array).to(self._device.torch)
        return lambda: tensor

    patch.setattr(Uploads, "add", add)


def lists_the_most_likely_as_a_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprobs, "_largest_by_key", logprobs._largest_with_ties)


def looks_for_equals_first(patch: pytest.MonkeyPatch) -> None:
    whole = drawing._draw_in_id_order

    def draw(scores: Tensor, last: Tensor, equals: Tensor, parameters: drawing.Parameters) -> Tensor:
        (scores == last[:, None]).sum().item()
        return whole(scores, last, equals, parameters)

    patch.setattr(drawing, "_draw_in_id_order", draw)


def takes_the_device_for_one_that_waits(patch: pytest.MonkeyPatch) -> None:
    plain = Empty.__init__

    def init(self: Empty) -> None:
        plain(self)
        self.runs_behind = False

    patch.setattr(Empty, "__init__", init)


@pytest.mark.parametrize(
    "broken",
    [
        asks_whether_rows_have_a_min_p,
        asks_for_the_token_of_a_history,
        uploads_each_array_by_itself,
        lists_the_most_likely_as_a_cpu,
        looks_for_equals_first,
        takes_the_device_for_one_that_waits,
    ],
)
def test_a_sampler_that_asks_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    logits = torch.empty(ROWS, VOCAB, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), guarded():
        run(Sampler(VOCAB, None, Empty()), logits, [kind(row) for row in range(ROWS)])


# ---- both ways choose the same -------------------------------------------------------------------------------------


def strange_logits(chance: random.Random, generator: torch.Generator, rows: int, vocab: int) -> Tensor:
    """With ties, NaNs, rows of nothing, and hardly anything left."""
    logits = torch.randn(rows, vocab, generator=generator) * chance.choice([0.5, 2.0, 5.0])
    match chance.randrange(7):
        case 0:
            return logits.bfloat16()
        case 1:
            return logits.mul(2).round()
        case 2:
            return logits.zero_()
        case 3:
            logits[0, chance.randrange(vocab)] = torch.nan
            logits[-1] = -torch.inf
        case 4:
            logits[torch.rand(rows, vocab, generator=generator) < 0.9] = -torch.inf
        case 5:
            logits[0, chance.randrange(vocab)] = torch.inf
    return logits


def test_both_ways_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sequences of all kinds, over steps in changing batches, with slots that end and begin."""
    compared = 0
    for seed in range(40):
        chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        vocab, rows = chance.choice([5, 40, 300, 900]), chance.choice([1, 7, 40])
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", chance.choice([1 << 20, 3 * vocab]))
        both = Sampler(vocab, None, CpuDevice()), Sampler(vocab, None, Behind())
        for slot in range(rows):
            opened = any_state(chance, vocab)
            for sampler in both:
                sampler.open(slot, opened)
        for _ in range(8):
            slots = chance.sample(range(rows), chance.randint(1, rows))
            logits = strange_logits(chance, generator, len(slots), vocab)
            one, other = (sampler.sample(logits, slots) for sampler in both)
            assert torch.equal(one.tokens, other.tokens), seed
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs is not None and other.logprobs is not None:
                # NaNs do not equal themselves
                assert repr(one.logprobs.listed()) == repr(other.logprobs.listed()), seed
            compared += len(slots)
            ended, opened = chance.randrange(rows), any_state(chance, vocab)
            for sampler in both:
                sampler.close(ended)
                sampler.open(ended, opened)
    assert compared > 2000


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.9])
def test_equals_beyond_those_looked_at_stay(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small top-k in rows of few different scores: the k-th's equals are counted, not looked at."""
    monkeypatch.setattr(drawing, "TIE_ROOM", 1)
    logits = torch.randn(60, 700, generator=torch.Generator().manual_seed(3)).mul(1.5).round()
    chosen = []
    for device in (CpuDevice(), Behind()):
        sampler = Sampler(700, None, device)
        for slot in range(60):
            sampler.open(
                slot, state(noise_key=slot, top_k=1 + slot % 30, top_p=top_p, min_p=0.01 * (slot % 2))
            )
        chosen.append(torch.stack([sampler.sample(logits, list(range(60))).tokens for _ in range(10)]))
    assert torch.equal(*chosen)
    assert len(chosen[0].unique()) > 100


# ---- histories -----------------------------------------------------------------------------------------------------


def test_a_log_holds_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a count by hand, over the borders of pages and of what is looked at in one operation."""
    monkeypatch.setattr(histories, "_AT_ONCE", 3)
    sampler = Sampler(500, None, Behind())
    prompts = [[], list(range(64)), [7, 7, 499, 500, 9000], list(range(0, 500, 2))]
    outputs: list[list[int]] = [[], [3, 3, 70], [], [1]]
    for slot in range(4):
        sampler.open(slot, state(repetition_penalty=1.1, prompt=prompts[slot], output=outputs[slot]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        tokens = sampler.sample(torch.randn(4, 500, generator=generator) * 3, [0, 1, 2, 3]).tokens
        for slot, token in enumerate(tokens.tolist()):
            outputs[slot].append(token)
    kept = sampler._histories
    for slot in range(4):
        seen = {token for token in prompts[slot] + outputs[slot] if token < 500}
        log = kept._logs[slot]
        tokens, counts = kept._arena.tokens[log.pages].view(-1), kept._arena.counts[log.pages].view(-1)
        assert set(tokens.tolist()) == seen
        assert all(
            count == outputs[slot].count(token)
            for token, count in zip(tokens.tolist(), counts.tolist(), strict=True)
        )
        assert len(log.pages) == -(-log.size // histories.PAGE)


def test_pages_are_used_again() -> None:
    """Memory goes by what is open at once: 8 bytes a token, in whole pages."""
    sampler = Sampler(5000, None, Behind())
    logits = torch.zeros(2, 5000)
    for turn in range(50):
        for slot in (0, 1):
            sampler.open(slot, state(presence_penalty=1.0, prompt=list(range(turn, turn + 1000))))
        sampler.sample(logits, [0, 1])
        for slot in (0, 1):
            sampler.close(slot)
    assert sampler._histories._made == 2 * 16
    sampler.open(0, state(presence_penalty=1.0, prompt=[1]))
    sampler.close(0)
    sampler.sample(torch.zeros(0, 5000), [])
    assert not sampler._histories._unwritten and not sampler._histories._logs
