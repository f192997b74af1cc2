"""The backends of CUDA devices on a real one. Run with `TRITON_INTERPRET=0 pytest -m gpu`."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from tests import triton_interpreter  # before any module of kernels
from tests.attention.cases import DECODE, SEVERAL, TOLERANCE, Case, other_neighbours

from seesaw.attention.select import create_attention  # isort: skip
from seesaw.attention.triton_backend import TritonAttention  # isort: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(triton_interpreter.INTERPRETING, reason="needs TRITON_INTERPRET=0"),
]

BACKENDS = (
    "triton",
    "torch",
    pytest.param(
        "flashinfer",
        marks=pytest.mark.skipif(not importlib.util.find_spec("flashinfer"), reason="needs FlashInfer"),
    ),
)
ALL = {f"decode, {name}": case for name, case in DECODE.items()} | SEVERAL
WIDE = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
LARGE: dict[str, dict[str, Any]] = {
    "decode, 8B": {"contexts": [1000, 1, 40_000, 255, 256, 257] + [513] * 58, "counts": [1] * 64, **WIDE},
    "mixed, 8B": {"contexts": [3000, 0, 1000, 0], "counts": [1, 1500, 700, 1], "block_size": 32, **WIDE},
    "window, head of 80": {"contexts": [3000, 0], "counts": [200, 900], "head_dim": 80, "window": 512},
    "head of 256": {"contexts": [300, 900], "counts": [100, 1], "head_dim": 256},
    "prompts": {"contexts": [0] * 5, "counts": [700, 1, 128, 2, 65], "q_heads": 16, "head_dim": 64},
}
"""Made where they are used: they take time and memory."""


def _on_gpu(case: Case, dtype: torch.dtype) -> Case:
    return dataclasses.replace(case, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_matches_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    case = _on_gpu(ALL[name], dtype)
    if backend == "flashinfer" and (dtype == torch.float32 or case.head_dim not in (64, 128, 256)):
        pytest.skip("FlashInfer does not serve this")
    case.check(create_attention("cuda", backend, head_dim=case.head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_batches_match_reference(name: str, dtype: torch.dtype) -> None:
    case = Case(**LARGE[name], dtype=dtype, device="cuda")
    case.check(create_attention("cuda", head_dim=case.head_dim, dtype=dtype))
    case.check(create_attention("cuda", "triton", head_dim=case.head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 20], ids=["decode", "several queries"])
def test_a_result_does_not_depend_on_neighbours(count: int, dtype: torch.dtype) -> None:
    case = _on_gpu(Case([70, 1500], [1, count], q_heads=8, kv_heads=2, head_dim=128), dtype)
    result = case.run(TritonAttention(132))[1]
    for programs in (1, 132):
        assert torch.equal(other_neighbours(case, 1).run(TritonAttention(programs))[1], result)


@pytest.mark.parametrize("window", [None, 100])
def test_a_captured_decode_follows_its_tensors(window: int | None) -> None:
    """Captured for one token each in wide tables, replayed for long contexts: lengths are read on the device."""
    dtype = torch.bfloat16
    case = _on_gpu(Case([600, 33, 1200], [1, 1, 1], head_dim=64, window=window), dtype)
    backend = create_attention("cuda", "triton", head_dim=64, dtype=dtype)
    batch = case.batch(case.contexts, case.counts)
    q, k, v = (
        torch.cat([x[i][c : c + 1] for i, c in enumerate(case.contexts)]) for x in (case.q, case.k, case.v)
    )
    contexts = batch.context_starts.clone()
    slots = batch.slot_mapping.clone()
    batch.context_starts.zero_()
    batch.slot_mapping.fill_(-1)

    def attend() -> torch.Tensor:
        return backend.attend(q, k, v, case.pool[:, 1], batch, scale=0.125, window=window)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    batch.context_starts.copy_(contexts)
    batch.slot_mapping.copy_(slots)
    graph.replay()
    for index, row in enumerate(out.cpu().double()):
        torch.testing.assert_close(row, case.expected(index)[0], rtol=0, atol=TOLERANCE[dtype])


def test_nothing_waits_for_the_device() -> None:
    case = _on_gpu(Case([600, 33, 0], [1, 1, 40], head_dim=64), torch.bfloat16)
    backend = create_attention("cuda", "triton", head_dim=64, dtype=torch.bfloat16)
    case.run(backend)
    batch = case.batch(case.contexts, case.counts)
    q = torch.randn(42, 4, 64, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.attend(q, q[:, :2], q[:, 2:], case.pool[:, 1], batch, scale=0.125, window=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
