"""What FlashInfer is told of a batch, against a double that computes by it; and when it is planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import triton_interpreter  # before any module of kernels
from tests.attention import flashinfer_double as double
from tests.attention.cases import Case

from seesaw.attention.flashinfer_backend import FlashInferAttention  # isort: skip
from seesaw.attention.triton_backend import TritonAttention  # isort: skip

triton_interpreter.skip_unless_interpreting()

CASES = {
    "decode": Case([100, 0, 63, 64], [1] * 4),
    "window": Case([30, 0, 40], [1, 26, 3], window=20),
    "mixed, blocks of 32": Case([50, 0, 7], [1, 40, 9], block_size=32),
    "some with nothing": Case([30, 0, 7], [0, 2, 1]),
    "nothing anywhere but one": Case([0, 16], [0, 1]),
}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FlashInferAttention:
    for wrapper in (double.BatchPrefillWithPagedKVCacheWrapper, double.BatchDecodeWithPagedKVCacheWrapper):
        monkeypatch.setattr(wrapper, "plans", 0)
    return FlashInferAttention(double, TritonAttention(1))


@pytest.mark.parametrize("known", [True, False], ids=["lengths on the host", "on the device alone"])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, known: bool, backend: FlashInferAttention) -> None:
    case = dataclasses.replace(CASES[name], head_dim=64, dtype=torch.bfloat16)
    if not known:
        batch = case.batch
        case.batch = lambda *x: dataclasses.replace(batch(*x), host_lengths=None)  # type: ignore[method-assign]
    case.check(backend)
    decode = double.BatchDecodeWithPagedKVCacheWrapper.plans
    assert (decode, double.BatchPrefillWithPagedKVCacheWrapper.plans) == (
        (1, 0) if name == "decode" else (0, 1)
    )


def test_plans_once_for_a_batch_and_kind_of_window(backend: FlashInferAttention) -> None:
    """However many layers there are, and whichever way windows alternate between them."""
    case = Case([50, 9], [1, 3], head_dim=64, dtype=torch.bfloat16)
    rows = [
        torch.cat([x[i][a : a + n] for i, (a, n) in enumerate(((50, 1), (9, 3)))])
        for x in (case.q, case.k, case.v)
    ]
    for step in (1, 2):
        batch = case.batch(case.contexts, case.counts)
        results = [
            backend.attend(*rows, case.pool[:, 1], batch, scale=0.125, window=window)
            for window in (None, 20, None, 20)
        ]
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
        assert not torch.equal(results[0], results[1])
        assert double.BatchPrefillWithPagedKVCacheWrapper.plans == 2 * step


@pytest.mark.parametrize(
    "case",
    [Case([20], [2], head_dim=64), Case([20], [1], head_dim=40, dtype=torch.bfloat16)],
    ids=["float32", "head of 40"],
)
def test_what_it_lacks_goes_to_triton(case: Case, backend: FlashInferAttention) -> None:
    case.check(backend)
    assert not double.BatchPrefillWithPagedKVCacheWrapper.plans
    assert not double.BatchDecodeWithPagedKVCacheWrapper.plans


def test_a_captured_batch_goes_to_triton(
    backend: FlashInferAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seesaw.attention.flashinfer_backend._capturing", lambda q: True)
    Case([20], [1], head_dim=64, dtype=torch.bfloat16).check(backend)
    assert not double.BatchDecodeWithPagedKVCacheWrapper.plans


def test_a_padded_batch_goes_to_triton_before_it_is_captured(backend: FlashInferAttention) -> None:
    """Else a capture would be the first to compile what it holds."""
    case = Case([20], [1], head_dim=64, dtype=torch.bfloat16)
    batch = case.batch
    case.batch = lambda *x: dataclasses.replace(batch(*x), padded=True, host_lengths=None)  # type: ignore[method-assign]
    case.check(backend)
    assert not double.BatchDecodeWithPagedKVCacheWrapper.plans
