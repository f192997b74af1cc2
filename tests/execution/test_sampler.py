"""The sampler against transformers' logits processors, direct formulas and statistics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation import logits_process as hf

from seesaw.core.actions import ChosenToken, SamplingState
from seesaw.core.noise import noise_key
from seesaw.execution.sampling import Sampler, SampleResult, drawing
from seesaw.execution.sampling import sampler as module
from seesaw.execution.sampling.rows import uniforms
from tests.execution.sampled import PLAIN, state

torch.set_num_threads(1)


def keyed(i: int, **changes: Any) -> SamplingState:
    return state(noise_key=noise_key(7, f"request-{i}", 0, None), **changes)


def listed(result: SampleResult) -> list[ChosenToken | None]:
    """Log-probabilities of a CPU's rows."""
    return [] if result.logprobs is None else result.logprobs.listed()


def draw(logits: torch.Tensor, samples: int, **changes: Any) -> torch.Tensor:
    """`samples` draws from one row of logits, each by a sequence of its own."""
    sampler = Sampler(logits.shape[-1])
    for slot in range(samples):
        sampler.open(slot, keyed(slot, **changes))
    return sampler.sample(logits.expand(samples, -1), list(range(samples))).tokens


def expected(logits: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The distribution transformers gives for one row, its warpers called in vLLM's order."""
    p = {**PLAIN, **changes}
    seen = torch.tensor([p["prompt"] + p["output"]], dtype=torch.long)
    warpers: list[Any] = []
    if p["repetition_penalty"] != 1.0:
        warpers.append(hf.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"]))
    warpers.append(hf.TemperatureLogitsWarper(p["temperature"]))
    if p["min_p"] > 0:
        warpers.append(hf.MinPLogitsWarper(p["min_p"]))
    if p["top_k"] > 0:
        warpers.append(hf.TopKLogitsWarper(p["top_k"]))
    if p["top_p"] < 1:
        warpers.append(hf.TopPLogitsWarper(p["top_p"]))
    scores = logits[None].float()
    for warp in warpers:
        scores = warp(seen, scores)
    return scores.softmax(-1)[0]


def check_frequencies(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square at 1e-4 over bins of at least 5 expected draws; nothing of probability 0 was drawn."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any()
    wanted = probabilities.double() / probabilities.double().sum() * len(tokens)
    order = wanted.argsort(descending=True)
    big = int((wanted >= 5).sum())
    observed, wanted = counts[order], wanted[order]
    bins = [*zip(observed[:big].tolist(), wanted[:big].tolist(), strict=True)]
    tail = (float(observed[big:].sum()), float(wanted[big:].sum()))
    bins += [tail] if tail[1] > 0 else []
    if len(bins) > 1:
        seen, hoped = (np.array(column) for column in zip(*bins, strict=True))
        assert stats.chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > 1e-4


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 12},
    "top_k_one": {"top_k": 1, "temperature": 3.0},
    "top_k_all": {"top_k": 5000},
    "top_p": {"top_p": 0.8},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p_one": {"min_p": 1.0},
    "k_then_p": {"top_k": 20, "top_p": 0.7, "temperature": 1.5},
    "all": {"top_k": 25, "top_p": 0.8, "min_p": 0.04, "temperature": 1.7},
    "min_p_before_top_p": {"top_p": 0.6, "min_p": 0.3},
    "repetition": {"repetition_penalty": 1.8, "prompt": [3, 3, 5, 60], "output": [7, 5]},
    "repetition_below_one": {"repetition_penalty": 0.5, "prompt": [1, 2, 3], "top_p": 0.9},
}


@pytest.mark.parametrize("name", CASES)
def test_distribution_is_that_of_transformers(name: str) -> None:
    # 300 ids: more than one summing group and not a multiple of its width.
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2
    tokens = draw(logits, 20000, **CASES[name])
    check_frequencies(tokens, expected(logits, **CASES[name]))


@pytest.mark.parametrize(
    "changes", [{"top_p": 0.9}, {"top_k": 400, "top_p": 0.99}, {"top_p": 0.3, "min_p": 1e-3}]
)
def test_support_in_a_large_flat_vocabulary(changes: dict[str, Any]) -> None:
    """Thousands of tokens stay, so the search for the cut has to widen."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40000, generator=generator) * 1.5
    wanted = expected(logits, **changes)
    tokens = draw(logits, 200, **changes)
    assert not (wanted[tokens] == 0).any()
    # 16 bins of equal expected mass, in id order.
    edges = (wanted.double().cumsum(0) * 16).floor().long().clamp(max=15)
    mass = torch.zeros(16, dtype=torch.float64).index_add_(0, edges, wanted.double())
    check_frequencies(edges[tokens], mass)


def test_boundaries_of_the_kept_set_are_exact() -> None:
    """Every token that may be drawn is drawn, none other: swept over all uniforms, not left to chance."""
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    for changes, kept in (
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.81}, {0, 1}),  # 0.4 + 0.3 of the remaining 0.85 is 0.82
        ({"top_k": 3, "top_p": 0.83}, {0, 1, 2}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 0.3, "top_p": 0.81}, {0, 1}),  # top-p of what min-p left
    ):
        assert set(draw(logits, 600, **changes).tolist()) == kept


def test_ties_keep_all_equals_in_top_k_and_lowest_ids_in_top_p() -> None:
    assert set(draw(torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0]), 500, top_k=2).tolist()) == {1, 2, 3, 4}
    # Ten equals share everything: half of the mass is five of them, the lowest ids.
    logits = torch.full((5000,), -torch.inf)
    logits[100:3100:300] = 1.0
    assert set(draw(logits, 500, top_p=0.5).tolist()) == {100, 400, 700, 1000, 1300}
    # More equals than places looked at first.
    assert len(set(draw(torch.zeros(500), 3000, top_k=5).tolist())) > 480
    assert max(draw(torch.zeros(500), 3000, top_p=0.5).tolist()) == 249
    # More equals than are looked at first: the search has to widen.
    assert max(draw(torch.zeros(9000), 100, top_k=5).tolist()) > 8000


def test_greedy_takes_the_argmax_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    plain, custom = Sampler(4), Sampler(4)
    for slot in (0, 1):
        plain.open(slot, None)
        custom.open(slot, state(temperature=0.0, logprobs=0))
    assert plain.sample(logits, [0, 1]).tokens.tolist() == [1, 0]
    assert plain.sample(logits, [0, 1]).logprobs is None
    assert custom.sample(logits, [0, 1]).tokens.tolist() == [1, 0]


def test_greedy_rows_of_a_mixed_batch_stay_greedy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 500, generator=generator)
    before = logits.clone()
    sampler = Sampler(500)
    for slot in range(60):
        kinds = (None, state(temperature=0.0, top_p=0.5, logprobs=2), keyed(slot, temperature=2.0))
        sampler.open(slot, kinds[slot % 3])
    result = sampler.sample(logits, list(range(60)))
    best = logits.argmax(-1)
    greedy = torch.arange(60) % 3 != 2
    assert torch.equal(result.tokens[greedy], best[greedy])
    assert not torch.equal(result.tokens[~greedy], best[~greedy])
    assert [entry is not None for entry in listed(result)] == [slot % 3 == 1 for slot in range(60)]
    assert torch.equal(logits, before)


def _varied(i: int) -> SamplingState | None:
    cases = [*CASES.values(), {"temperature": 0.0, "repetition_penalty": 1.2, "prompt": [1, 9]}]
    return None if i % 17 == 16 else keyed(i, **cases[i % 17])


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(range(34))), st.integers(1, 34), st.booleans())
def test_choice_does_not_depend_on_the_batch(order: list[int], size: int, wide: bool) -> None:
    """The same sequences in other slots, other rows and other batches choose the same tokens."""
    vocab, steps = (9000 if wide else 700), 3
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(steps, 34, vocab, generator=generator).mul(2).bfloat16().float()  # bf16: many ties
    alone = Sampler(vocab)
    chosen = torch.empty(steps, 34, dtype=torch.long)
    for i in range(34):
        alone.open(0, _varied(i))
        for step in range(steps):
            chosen[step, i] = alone.sample(logits[step, i : i + 1], [0]).tokens[0]
        alone.close(0)
    together = Sampler(vocab)
    for i in range(34):
        together.open(2 * i + 5, _varied(i))
    for step in range(steps):
        for start in range(0, 34, size):
            batch = order[start : start + size]
            tokens = together.sample(logits[step, batch], [2 * i + 5 for i in batch]).tokens
            assert torch.equal(tokens, chosen[step, batch])


@pytest.mark.parametrize("changes", [{}, {"top_k": 30}, {"top_p": 0.9}])
def test_rounding_that_swaps_near_equals_changes_few_choices(changes: dict[str, Any]) -> None:
    """Layouts differ in the last bits of their logits; the order of near equals must not steer the choice."""
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(60, generator=generator)
    logits = torch.cat([logits, logits, torch.full((180,), -9.0)])
    noisy = logits + 1e-6 * torch.randn(300, generator=generator)
    assert not torch.equal(logits.argsort(descending=True), noisy.argsort(descending=True))
    same = draw(logits, 2000, **changes) == draw(noisy, 2000, **changes)
    assert same.float().mean() > 0.995


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(20, 400, generator=torch.Generator().manual_seed(2))
    results = []
    for elements in (1 << 23, 400 * 3):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        sampler = Sampler(400)
        for slot in range(20):
            sampler.open(slot, keyed(slot, logprobs=slot % 3 - 1))
        results.append(sampler.sample(logits, list(range(20))))
    assert torch.equal(results[0].tokens, results[1].tokens)
    for one, other in zip(*map(listed, results), strict=True):
        assert one == other


@pytest.mark.parametrize("ties", [False, True])
def test_looking_at_few_scores_changes_nothing(monkeypatch: pytest.MonkeyPatch, ties: bool) -> None:
    """Rows with a small top-k take a short cut: with room for more ties than there are ids, none does."""
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(11))
    if ties:
        logits = logits.mul(3).round()  # up to hundreds of equals, more than the short cut looks at
    results = []
    for room in (drawing.TIE_ROOM, 10000):
        monkeypatch.setattr(drawing, "TIE_ROOM", room)
        sampler = Sampler(3000)
        for slot in range(40):
            top_k, top_p, min_p = (1, 7, 50, 200)[slot % 4], (1.0, 0.6)[slot % 2], (0.0, 0.02)[slot % 3 == 2]
            sampler.open(slot, keyed(slot, top_k=top_k, top_p=top_p, min_p=min_p, temperature=1.5))
        results.append([sampler.sample(logits, list(range(40))).tokens for _ in range(5)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_argmax_may_be_given() -> None:
    asked = []

    def argmax(logits: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(logits.shape))
        return logits.argmax(-1)

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(12)).bfloat16()
    sampler = Sampler(50, argmax)
    for slot in range(3):
        sampler.open(slot, None if slot else state(temperature=0.0, presence_penalty=0.5))
    assert torch.equal(sampler.sample(logits[1:], [1, 2]).tokens, logits[1:].argmax(-1))
    assert torch.equal(sampler.sample(logits, [0, 1, 2]).tokens, logits.argmax(-1))
    assert asked == [(2, 50), (3, 50)]


def test_penalties_follow_the_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    prompt, output = [1, 2, 2, 30], [2, 7, 7, 7, 31]
    repetition, presence, frequency = 1.3, 0.7, 0.4
    sampler = Sampler(50)
    # A prompt may hold ids beyond the logits (the embedding of some models has more rows).
    parameters: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "prompt": [*prompt, 50, 77],
    }
    sampler.open(3, state(**parameters, output=output, generated=len(output)))
    for step in range(40):
        # Negative logits are multiplied by the repetition penalty: every other step has no positive one.
        logits = torch.randn(1, 50, generator=generator) * 0.5 - 4.0 * (step % 2)
        scores = logits[0].clone()
        for token in set(prompt + output):
            value = float(scores[token])
            scores[token] = value / repetition if value > 0 else value * repetition
        for token, count in Counter(output).items():
            scores[token] -= frequency * count + presence
        chosen = int(sampler.sample(logits, [3]).tokens)
        assert chosen == int(scores.argmax())
        output.append(chosen)
    assert len(set(output)) > 20


def test_penalty_on_frequencies_is_that_of_the_penalised_logits() -> None:
    logits = torch.randn(80, generator=torch.Generator().manual_seed(8))
    output = [4, 4, 4, 9, 70]
    wanted = logits.clone()
    for token, count in Counter(output).items():
        wanted[token] -= 0.5 * count - 1.0
    tokens = draw(logits, 20000, presence_penalty=-1.0, frequency_penalty=0.5, prompt=[11, 12], output=output)
    check_frequencies(tokens, wanted.softmax(-1))


def test_min_tokens_bans_stop_tokens_until_reached() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    sampler = Sampler(4)
    # Id 99 is not among the logits and must do no harm.
    sampler.open(0, state(temperature=0.0, min_tokens=3, stop_token_ids=[1, 99], generated=1))
    sampler.open(1, keyed(1, temperature=0.2, min_tokens=2, stop_token_ids=[1, 2]))
    both = torch.cat([logits, logits])
    columns = zip(*[sampler.sample(both, [0, 1]).tokens.tolist() for _ in range(4)], strict=True)
    greedy, drawn = (list(column) for column in columns)
    assert greedy == [2, 2, 1, 1]
    assert set(drawn[:2]) <= {0, 3} and set(drawn[2:]) <= {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_raw_log_softmax(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 3000, generator=torch.Generator().manual_seed(6)) * 2).to(dtype)
    sampler = Sampler(3000)
    sampler.open(0, keyed(0, temperature=3.0, logprobs=4))
    sampler.open(1, keyed(1, temperature=0.0, logprobs=20, repetition_penalty=1.5, prompt=list(range(100))))
    sampler.open(2, None)
    sampler.open(3, keyed(3, logprobs=0))
    tokens, logprobs = (lambda r: (r.tokens.tolist(), listed(r)))(sampler.sample(logits, [0, 1, 2, 3]))
    assert logprobs[2] is None
    table = logits.float().log_softmax(-1)
    for row, wanted in ((0, 4), (1, 20), (3, 0)):
        entry = logprobs[row]
        assert isinstance(entry, ChosenToken)
        assert entry.logprob == pytest.approx(float(table[row, tokens[row]]), abs=1e-5)
        assert entry.rank == 1 + int((table[row] > table[row, tokens[row]]).sum())
        ranked = sorted(range(3000), key=lambda i: (-float(table[row, i]), i))[:wanted]
        assert [token for token, _ in entry.top] == ranked
        assert [value for _, value in entry.top] == pytest.approx(table[row, ranked].tolist(), abs=1e-5)


def test_logprobs_list_orders_many_equals_by_id() -> None:
    sampler = Sampler(2500)
    sampler.open(0, state(temperature=0.0, logprobs=3))
    entry = listed(sampler.sample(torch.zeros(1, 2500), [0]))[0]
    assert entry is not None and [token for token, _ in entry.top] == [0, 1, 2] and entry.rank == 1


@pytest.mark.parametrize("moved_after", [1, 4, 9])
def test_reopened_slot_continues_as_if_never_closed(moved_after: int) -> None:
    """A sequence that moves between layouts goes on with the same noise, history and bans."""
    steps, vocab, prompt = 12, 40, [1, 2, 3]
    logits = torch.randn(steps, 1, vocab, generator=torch.Generator().manual_seed(9))
    parameters: dict[str, Any] = {
        "temperature": 1.3,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.9,
        "min_tokens": 8,
        "stop_token_ids": [int(i) for i in logits.sum(0)[0].topk(5).indices],
        "prompt": prompt,
    }
    whole = Sampler(vocab)
    whole.open(0, keyed(0, **parameters))
    uninterrupted = [int(whole.sample(row, [0]).tokens) for row in logits]
    first, second, output = Sampler(vocab), Sampler(vocab), list[int]()
    first.open(2, keyed(0, **parameters))
    for row in logits[:moved_after]:
        output.append(int(first.sample(row, [2]).tokens))
    second.open(70, keyed(0, **parameters, output=list(output), generated=len(output)))
    for row in logits[moved_after:]:
        output.append(int(second.sample(row, [70]).tokens))
    assert output == uninterrupted


def test_closed_slot_forgets_everything() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.9]])
    sampler = Sampler(3)
    sampler.open(
        0, state(temperature=0.0, presence_penalty=2.0, output=[1], min_tokens=9, stop_token_ids=[2])
    )
    assert int(sampler.sample(logits, [0]).tokens) == 1
    sampler.close(0)
    sampler.open(0, None)
    assert int(sampler.sample(logits, [0]).tokens) == 1
    sampler.close(0)
    sampler.open(0, state(temperature=0.0))
    assert int(sampler.sample(logits, [0]).tokens) == 1
    with pytest.raises(AssertionError, match="slot 0 is open"):
        sampler.open(0, None)
    with pytest.raises(AssertionError, match="not open"):
        sampler.sample(logits, [1])


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-torch.inf, -torch.inf, -torch.inf], [0.0, torch.nan, 1.0]])
    for changes in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 1e-4}, {"temperature": 1e-30}):
        sampler = Sampler(3)
        for slot in range(3):
            sampler.open(slot, keyed(slot, **changes))
        assert sampler.sample(logits, [0, 1, 2]).tokens.tolist() == [0, 0, 1]
    assert Sampler(3).sample(torch.empty(0, 3), []).tokens.tolist() == []


def test_uniforms_are_splitmix64() -> None:
    # Reference output of SplitMix64 seeded with 1234567 (Vigna's splitmix64.c).
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    keys = np.full(4, 1234567, dtype=np.uint64)
    numbers = uniforms(keys, np.arange(4))
    assert numbers.tolist() == [((bits >> 12) + 0.5) / 2**52 for bits in first]
    assert uniforms(np.array([2**64 - 1], dtype=np.uint64), np.array([10**9])).item() < 1.0


def test_noise_of_different_sequences_and_tokens_is_uniform() -> None:
    keys = np.array([noise_key(0, str(i), i % 3, None) for i in range(300)], dtype=np.uint64)
    grid = uniforms(np.repeat(keys, 50), np.tile(np.arange(50), 300)).reshape(300, 50)
    assert stats.kstest(grid.ravel(), "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.03
    assert len(np.unique(grid)) == grid.size


def test_noise_key_separates_what_it_should() -> None:
    keys = [
        noise_key(seed, name, index, None)
        for seed in (0, 1)
        for name in ("a", "0:a", "\ud800")
        for index in (0, 1)
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert noise_key(0, "a", 1, 5) == noise_key(9, "b", 1, 5) != noise_key(0, "a", 0, 5)
    assert noise_key(0, "a", 1, -5) not in (noise_key(0, "a", 1, 5), noise_key(0, "a", 1, None))


def test_noise_key_is_stable_across_processes_and_needs_no_torch() -> None:
    program = (
        "import sys; from seesaw.core.noise import noise_key; print(noise_key(3, 'row-17', 2, None));"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert int(run.stdout) == noise_key(3, "row-17", 2, None) == KNOWN_KEY


KNOWN_KEY = 7300067653555361796
"""Changing it changes every seeded output of every user."""
