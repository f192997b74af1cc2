"""The Triton kernels, in Triton's interpreter: against float64 references, and bit for bit against each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seesaw.core.workspace import SPLITS
from tests import triton_interpreter  # before any module of kernels
from tests.attention.cases import DECODE, SEVERAL, TOLERANCE, Case, other_neighbours

from seesaw.attention import triton_decode  # isort: skip
from seesaw.attention.base import AttentionBatch  # isort: skip
from seesaw.attention.triton_backend import TritonAttention  # isort: skip

triton_interpreter.skip_unless_interpreting()

# few programs and small chunks: in the interpreter, sequences of a hundred tokens are many chunks of many shares
BACKEND = TritonAttention(1, chunk=64)


@pytest.mark.parametrize("name", DECODE)
def test_decode_matches_reference(name: str) -> None:
    """Blocks in any order, garbage in the padding of block tables, NaN in the pool beyond each sequence."""
    DECODE[name].check(BACKEND)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_queries_match_reference(name: str) -> None:
    SEVERAL[name].check(BACKEND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types(dtype: torch.dtype) -> None:
    """Off by the rounding of the weights, averaged, and of the result: a few ulp of values below one."""
    for case in (Case([70, 9], [1, 20], dtype=dtype), Case([130], [1], dtype=dtype, kv_heads=1)):
        for index, result in enumerate(case.run(BACKEND)):
            expected = case.expected(index)
            limit = torch.finfo(dtype).eps * (expected.abs().clamp(min=1))
            assert ((result.double() - expected).abs() <= limit).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of padded rows, which are not stored
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3))
    kv_heads = data.draw(st.integers(1, 2))
    Case(
        contexts=data.draw(st.lists(st.integers(0, 90), min_size=size, max_size=size)),
        counts=data.draw(st.lists(st.sampled_from([1, 1, 2, 9, 40]), min_size=size, max_size=size)),
        q_heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=8 * data.draw(st.integers(1, 8)),
        block_size=data.draw(st.sampled_from([1, 3, 16, 32])),
        window=data.draw(st.none() | st.integers(1, 100)),
        seed=data.draw(st.integers(0, 99)),
    ).check(TritonAttention(data.draw(st.integers(1, 4)), chunk=64))


@pytest.mark.parametrize(("window", "count"), [(None, 1), (90, 1), (90, 20)])
def test_a_result_does_not_depend_on_neighbours(window: int | None, count: int) -> None:
    """Nor on how many programs share the work: the same bits."""
    case = Case([70, 150], [1, count], q_heads=2, kv_heads=1, window=window)
    result = case.run(BACKEND)[1]
    for other, programs in ((other_neighbours(case, 1), 2), (dataclasses.replace(case), 3)):
        assert torch.equal(other.run(TritonAttention(programs, chunk=64))[1], result)
    alone = Case([150], [count], q_heads=2, kv_heads=1, window=window)
    for rows in ("q", "k", "v"):
        getattr(alone, rows)[0] = getattr(case, rows)[1]
    alone._fill(0, 150)
    assert torch.equal(alone.run(TritonAttention(1, chunk=64))[0], result)


def test_a_prompt_in_chunks() -> None:
    case = Case([0], [120], kv_heads=1)
    parts, done = [], 0
    for count in (50, 2, 1, 67):
        parts += case.feed(BACKEND, [done], [count])
        done += count
    torch.testing.assert_close(torch.cat(parts).double(), case.expected(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [[0, 2], []], ids=["two of three", "none"])
def test_queries_of_some_tokens_only(kept: list[int]) -> None:
    """All K and V are written; of the sequences `kept` the last token alone asks."""
    case, whole = Case([10, 0, 90], [7, 20, 3]), Case([10, 0, 90], [7, 20, 3])
    whole.run(BACKEND)
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
    out = BACKEND.attend(q, k, v, case.pool[:, 1], some, scale=case.head_dim**-0.5, window=None)
    assert torch.equal(case.pool.nan_to_num(9), whole.pool.nan_to_num(9))
    assert len(out) == len(kept)
    for row, index in zip(out, kept, strict=True):
        torch.testing.assert_close(row.double(), case.expected(index)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_writes_the_new_tokens_and_nothing_else(dtype: torch.dtype) -> None:
    case = Case([10, 0], [7, 20], dtype=dtype, block_size=4, kv_heads=3, q_heads=3, head_dim=24)
    before = case.pool.clone()
    batch = case.batch(case.contexts, case.counts)
    packed = [
        torch.cat([x[i][a : a + n] for i, (a, n) in enumerate(zip(case.contexts, case.counts, strict=True))])
        for x in (case.k, case.v)
    ]
    fused = torch.cat(packed, dim=1)
    slots = batch.slot_mapping.clone()
    slots[3] = -1
    triton_decode.store_tokens(fused[:, :3], fused[:, 3:], case.pool[:, 1], slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before[slot // 4, 1, 0, :, slot % 4] = packed[0][token]
            before[slot // 4, 1, 1, :, slot % 4] = packed[1][token]
    assert torch.equal(case.pool.nan_to_num(9), before.nan_to_num(9))


def test_extreme_scores() -> None:
    """Scores far apart, in rising and falling order: running maxima must neither overflow nor vanish."""
    for sign in (1, -1):
        case = Case([200], [1], head_dim=8, q_heads=1, kv_heads=1)
        case.k[0] = torch.linspace(-300, 300, 201)[:, None, None].expand(-1, 1, 8).contiguous() * sign
        case.q[0] = torch.full((201, 1, 8), 3.0)
        case._fill(0, 200)
        case.check(BACKEND)


def test_nan_shows() -> None:
    case = Case([100, 20], [1, 2])
    for index in (0, 1):
        case.pool[case.tables[index][0], 1, 0, 0, 3] = torch.nan
    for result in case.run(BACKEND):
        heads = result.view(len(result), 4, -1)
        assert heads[:, :2].isnan().all() and not heads[:, 2:].isnan().any()


def test_query_type_may_differ_from_pool() -> None:
    case = Case([40, 70], [3, 1], dtype=torch.bfloat16)
    q, k, v = (torch.cat([x[0][40:], x[1][70:]]).float() for x in (case.q, case.k, case.v))
    batch = case.batch([40, 70], [3, 1])
    out = BACKEND.attend(q, k, v, case.pool[:, 1], batch, scale=0.25, window=None)
    assert out.dtype == torch.float32
    expected = torch.cat([case.expected(0), case.expected(1)])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_chunks_of_any_pool_are_bounded() -> None:
    """Whatever fits a pool makes `SPLITS` chunks at most, beyond one for each sequence: what memory plans count."""
    for blocks in (10, 1000, 16_384, 16_385, 300_000):
        pool = torch.empty((blocks, 2, 1, 16, 8), device="meta")
        chunk = triton_decode.chunk_tokens(pool)
        assert chunk >= triton_decode.CHUNK and chunk & (chunk - 1) == 0
        assert blocks * 16 // chunk <= SPLITS


def test_whole_prompts_go_where_flash_attention_serves() -> None:
    """With no context and a query for every token; K and V are written all the same."""
    calls: list[tuple[int, int | None]] = []

    def flash(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        calls.append((longest, window))
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    backend = TritonAttention(2, whole_prompts=flash)
    fresh = Case([0, 0], [20, 3], dtype=torch.bfloat16, window=9)
    fresh.run(backend)
    assert calls == [(20, 9)]
    slots = fresh.batch(fresh.contexts, fresh.counts).slot_mapping
    assert not fresh.pool[slots // 16, 1, :, :, slots % 16].isnan().any()
    for other in (
        Case([0, 1], [20, 3], dtype=torch.bfloat16),
        Case([0], [20]),
        Case([0], [1], dtype=torch.bfloat16),
    ):
        other.check(backend)
    assert len(calls) == 1
