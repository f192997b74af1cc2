"""Attention over the paged pool against a float64 reference that knows no pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch
from seesaw.attention.select import create_attention
from seesaw.core.errors import ConfigError
from seesaw.native.build import load
from tests.attention.cases import TOLERANCE, Case


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backends() -> list[AttentionBackend]:
    found = {backend.name: backend for backend in (create_attention("cpu"), create_attention("cpu", "torch"))}
    return list(found.values())


CASES = {
    "decode": Case([100, 0, 63, 64, 200], [1, 1, 1, 1, 1]),
    "prefill": Case([0, 0, 0], [200, 1, 65]),
    "mixed": Case([150, 0, 7], [1, 90, 40]),
    "window": Case([300, 0, 40], [1, 260, 30], window=50),
    "window of one": Case([70], [10], window=1),
    "window longer than all": Case([20], [10], window=4096),
    "no groups": Case([90], [3], q_heads=5, kv_heads=5),
    "one KV head, odd group": Case([90], [30], q_heads=7, kv_heads=1),
    "wide group": Case([70], [3], q_heads=64, kv_heads=1),
    "head of 8": Case([70], [3], head_dim=8),
    "head of 40": Case([70], [3], head_dim=40),
    "head of 72": Case([70, 3], [1, 70], head_dim=72),
    "head of 128": Case([70, 3], [1, 70], head_dim=128),
    "head of 64, groups of 2": Case([150, 9, 64], [1, 1, 2], q_heads=4, kv_heads=2, head_dim=64),
    "head of 64, groups of 8": Case([150, 9], [1, 1], q_heads=16, kv_heads=2, head_dim=64),
    "head of 256": Case([20], [50], head_dim=256),
    "blocks of 5": Case([93], [40], block_size=5),
    "blocks of 1": Case([33], [4], block_size=1),
    "blocks of 256": Case([300], [4], block_size=256),
    "nothing new": Case([30, 40], [0, 2]),
}


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, dtype: torch.dtype, backend: AttentionBackend) -> None:
    dataclasses.replace(CASES[name], dtype=dtype).check(backend)


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_matches_reference_for_any_batch(backend: AttentionBackend, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    kv_heads = data.draw(st.integers(1, 4))
    Case(
        contexts=data.draw(st.lists(st.integers(0, 150), min_size=size, max_size=size)),
        counts=data.draw(st.lists(st.integers(1, 80), min_size=size, max_size=size)),
        q_heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=8 * data.draw(st.integers(1, 8)),
        block_size=data.draw(st.integers(1, 40)),
        window=data.draw(st.none() | st.integers(1, 200)),
        seed=data.draw(st.integers(0, 99)),
    ).check(backend)


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_writes_the_new_tokens_and_nothing_else(dtype: torch.dtype, backend: AttentionBackend) -> None:
    case = Case([10, 0], [7, 20], dtype=dtype, block_size=4)
    before = case.pool.clone()
    case.run(backend)
    for index, (context, count) in enumerate(zip(case.contexts, case.counts, strict=True)):
        for token in range(context, context + count):
            place = (case.tables[index][token // 4], 1, slice(None), slice(None), token % 4)
            assert torch.equal(case.pool[place], torch.stack([case.k[index][token], case.v[index][token]]))
            before[place] = case.pool[place]
    assert torch.equal(case.pool.nan_to_num(9), before.nan_to_num(9))


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("kept", [[0, 2], []], ids=["two of three", "none"])
def test_queries_of_some_tokens_only(backend: AttentionBackend, kept: list[int]) -> None:
    """All K and V are written; of the sequences `kept` the last token alone asks."""
    case, whole = Case([10, 0, 90], [7, 20, 3]), Case([10, 0, 90], [7, 20, 3])
    expected = whole.run(backend)
    batch = case.batch(case.contexts, case.counts)
    rows = [(case.contexts[i], case.contexts[i] + case.counts[i]) for i in range(3)]
    k, v = (torch.cat([x[i][a:b] for i, (a, b) in enumerate(rows)]) for x in (case.k, case.v))
    some = AttentionBatch(
        torch.arange(len(kept) + 1, dtype=torch.int32),
        torch.tensor([rows[i][1] - 1 for i in kept], dtype=torch.int32),
        batch.block_tables[kept],
        batch.slot_mapping,
        1,
    )
    q = torch.cat([case.q[i][-1:] for i in kept]) if kept else case.q[0][:0]
    out = backend.attend(q, k, v, case.pool[:, 1], some, scale=case.head_dim**-0.5, window=None)
    assert torch.equal(case.pool.nan_to_num(9), whole.pool.nan_to_num(9))
    assert len(out) == len(kept)
    for row, index in zip(out, kept, strict=True):
        torch.testing.assert_close(row, expected[index][-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_result_depends_on_the_sequence_alone(
    dtype: torch.dtype, window: int | None, threads: int
) -> None:
    """Whole, in chunks, token by token, alone or in a batch, on one thread or two: the same bits."""
    backend = create_attention("cpu")
    if backend.name != "cpu":
        pytest.skip("no C++ compiler here")
    case = Case([0, 0], [150, 90], q_heads=6, head_dim=40, window=window, dtype=dtype)
    whole = case.run(backend)
    torch.set_num_threads(threads)
    again = Case([0, 0], [150, 90], q_heads=6, head_dim=40, window=window, dtype=dtype)
    parts: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for counts in ([70, 1], [0, 0], [1, 60], [1, 0], [77, 1], *([[1, 1]] * 20)):
        fed = [min(n, total - at) for n, total, at in zip(counts, case.counts, done, strict=True)]
        if not any(fed):
            continue
        for index, result in enumerate(again.feed(backend, done, fed)):
            parts[index].append(result)
            done[index] += fed[index]
    for first, second in zip(whole, parts, strict=True):
        joined = torch.cat(second)
        assert torch.equal(first[: len(joined)], joined)
    assert done[0] == 150 and done[1] > 80


def test_torch_backend_does_not_mix_sequences() -> None:
    backend = create_attention("cpu", "torch")
    both, alone = Case([50, 9], [3, 20], seed=4), Case([50, 9], [3, 20], seed=4)
    result = both.run(backend)[0]
    for rows in (alone.q, alone.k, alone.v):
        rows[1].zero_()
    assert torch.equal(result, alone.run(backend)[0])


@pytest.mark.parametrize("most", [300.0, 3.0, 1.0, 0.5])
@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_extreme_scores(backend: AttentionBackend, most: float) -> None:
    """Scores far apart, in rising and falling order: running maxima must neither overflow nor vanish, however much
    they rise from one chunk to the next."""
    case = Case([200], [1], head_dim=8, q_heads=1, kv_heads=1)
    for sign in (1, -1):
        case.k[0] = torch.linspace(-most, most, 201)[:, None, None].expand(-1, 1, 8).contiguous() * sign
        case.q[0] = torch.full((201, 1, 8), 3.0)
        case._fill(0, 200)
        case.check(backend)


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_nan_shows(backend: AttentionBackend) -> None:
    case = Case([20], [2])
    case.pool[case.tables[0][0], 1, 0, 0, 3] = torch.nan
    result = case.run(backend)[0].view(2, 4, -1)
    assert result[:, :2].isnan().all() and not result[:, 2:].isnan().any()


def test_query_type_may_differ_from_pool() -> None:
    for backend in backends():
        case = Case([40], [3], dtype=torch.bfloat16)
        expected = case.expected(0)
        q, k, v = (rows[0][40:].float() for rows in (case.q, case.k, case.v))
        batch = case.batch([40], [3])
        out = backend.attend(q, k, v, case.pool[:, 1], batch, scale=0.25, window=None)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_native_refuses_what_lies_outside_the_pool() -> None:
    backend = create_attention("cpu")
    if backend.name != "cpu":
        pytest.skip("no C++ compiler here")
    for field, problem in (
        ("slot_mapping", "slot"),
        ("block_tables", "block table"),
        ("query_starts", "starts"),
    ):
        case = Case([40], [3])
        batch = case.batch([40], [3])
        getattr(batch, field).view(-1)[1] = 1 << 20
        q, k, v = (rows[0][40:] for rows in (case.q, case.k, case.v))
        with pytest.raises(AssertionError, match=problem):
            backend.attend(q, k, v, case.pool[:, 1], batch, scale=0.25, window=None)


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert create_attention("cpu", "torch").name == "torch"
    assert create_attention("cpu").name == ("cpu" if load() else "torch")
    monkeypatch.setenv("SEESAW_NATIVE", "0")
    assert create_attention("cpu").name == create_attention("cpu", "cpu").name == "torch"
    with pytest.raises(ConfigError, match="unknown backend 'flash'"):
        create_attention("cpu", "flash")
    with pytest.raises(ConfigError, match="device 'tpu:1'"):
        create_attention("tpu:1")
