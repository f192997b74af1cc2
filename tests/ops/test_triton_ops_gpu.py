"""The fused Triton operators on a GPU: the same cases as in the interpreter, and what bandwidth they reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import triton_interpreter

pytestmark = [pytest.mark.gpu, triton_interpreter.needs_compiled_kernels()]

from tests.ops import triton_cases  # noqa: E402 - behind the interpreter's switch

OPERATORS = triton_cases.OPERATORS


class TestCompiled(triton_cases.Cases):
    """See `triton_cases`."""

    device = "cuda"


def test_rows_beyond_two_to_the_31_elements() -> None:
    rows, width = (1 << 31) // 28672 + 3, 28672
    if torch.cuda.mem_get_info()[0] < 3.5 * rows * width:
        pytest.skip("needs 8 GiB of free device memory")
    gate_up = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = triton_cases.random(width, dtype=torch.bfloat16).cuda()
    assert torch.equal(OPERATORS.silu_mul(gate_up)[-1], OPERATORS.silu_mul(gate_up[-1:])[0])


def test_a_graph_holds_them() -> None:
    hidden, delta = (torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, logits = torch.ones_like(hidden[0]), torch.randn(64, 32_000, device="cuda")
    start = hidden.clone()

    def step() -> tuple[Tensor, Tensor]:
        return OPERATORS.add_rms_norm(hidden, delta, weight, 1e-5), OPERATORS.argmax(logits)

    step()  # compiled before anything is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    hidden.copy_(start)
    wanted = [result.clone() for result in step()]
    hidden.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rows", [1, 64, 512, 8192])
def test_bandwidth(rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted, for the shapes of an 8B model in bfloat16: bytes that must move over the time."""
    half, cuda = torch.bfloat16, "cuda"
    x, delta = (torch.randn(rows, 4096, device=cuda, dtype=half) for _ in range(2))
    weight = torch.ones(4096, device=cuda, dtype=half)
    gate_up = torch.randn(rows, 2 * 14336, device=cuda, dtype=half)
    heads, angles = torch.randn(rows, 40, 128, device=cuda, dtype=half), torch.randn(rows, 64, device=cuda)
    logits = torch.randn(min(rows, 512), 128_256, device=cuda)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "rms_norm": (lambda: OPERATORS.rms_norm(x, weight, 1e-5), 2 * x.nbytes),
        "add_rms_norm": (lambda: OPERATORS.add_rms_norm(x, delta, weight, 1e-5), 4 * x.nbytes),
        "rotate": (lambda: OPERATORS.rotate(heads, angles, angles), 2 * heads.nbytes + 2 * angles.nbytes),
        "silu_mul": (lambda: OPERATORS.silu_mul(gate_up), gate_up.nbytes * 3 // 2),
        "argmax": (lambda: OPERATORS.argmax(logits), logits.nbytes),
    }
    for name, (call, moved) in calls.items():
        seconds = graph_seconds(call)
        with capsys.disabled():
            print(
                f"\n{name:13} {rows:5} rows {seconds * 1e6:8.1f} us {moved / seconds / 1e9:7.0f} GB/s", end=""
            )
        assert seconds > 0


def graph_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Device seconds of a call, without the launches: `repeats` of it in a graph. Small operands come from cache."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    graph.replay()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / repeats
