"""The native small operators against plain torch, and both against float64.

Bounds: float32 within a few units in the last place (sums run in another order, products may be fused);
bfloat16 and float16 within one, since each side rounds a float32 result once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seesaw.ops.base import HeadNorms, Operators
from seesaw.ops.cpu import CpuOperators
from seesaw.ops.torch_ops import TorchOperators
from tests.ops.numbers import DTYPES, EPS, assert_near, exact_norm, random, strided, ulps_of

WIDTHS = (1, 5, 16, 31, 64, 100, 1000, 1024)
"""Below, at and between multiples of every vector width and of four vectors."""
TORCH = TorchOperators()


@pytest.fixture(scope="module")
def native(library: ctypes.CDLL) -> CpuOperators:
    return CpuOperators(library)


@pytest.fixture(params=["native", "torch"])
def operators(request: pytest.FixtureRequest) -> Operators:
    found: Operators = TORCH if request.param == "torch" else request.getfixturevalue("native")
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rms_norm(operators: Operators, dtype: torch.dtype, width: int, rows: int) -> None:
    x, weight = random(rows, width, dtype=dtype, scale=3.0), random(width, dtype=dtype, seed=1)
    wanted = exact_norm(x, weight)
    for given_x in (x, strided(x)):
        got = operators.rms_norm(given_x, weight, EPS)
        assert got.is_contiguous()
        assert_near(got, wanted, ulps=ulps_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_add_rms_norm(operators: Operators, dtype: torch.dtype, width: int, rows: int) -> None:
    hidden, delta = (random(rows, width, dtype=dtype, seed=seed, scale=2.0) for seed in (2, 3))
    weight = random(width, dtype=dtype, seed=4)
    total = hidden + delta  # rounded to the type
    for shape in (torch.clone, strided):
        changed, unchanged = shape(hidden), shape(delta)
        got = operators.add_rms_norm(changed, unchanged, weight, EPS)
        assert torch.equal(changed, total) and torch.equal(unchanged, delta)
        assert torch.equal(got, operators.rms_norm(total, weight, EPS))
        assert_near(got, exact_norm(total, weight), ulps=ulps_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 10, 32, 64, 80, 128])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rotate(operators: Operators, dtype: torch.dtype, head_dim: int, rows: int) -> None:
    packed = random(rows, 6, head_dim, dtype=dtype, seed=5)
    angles = random(rows, head_dim // 2, dtype=torch.float32, seed=6, scale=9.0)
    heads, others = packed[:, :4], packed[:, 4:].clone()  # rows are strided
    first, second = heads.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    c, s = cos.double()[:, None], sin.double()[:, None]
    wanted = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(dtype)
    assert operators.rotate(heads, cos, sin) is heads
    # where a difference nearly cancels, the error is that of its terms
    assert_near(heads, wanted, slack=1e-6)
    assert torch.equal(packed[:, 4:], others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_heads", [0, 3, 5])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_rotate_with_norms(operators: Operators, dtype: torch.dtype, q_heads: int, head_dim: int) -> None:
    """The norm comes first and is rounded to the type: bit for bit what the single operators make of it."""
    heads = random(4, 5, head_dim, dtype=dtype, seed=7, scale=2.0)
    angles = random(4, head_dim // 2, dtype=torch.float32, seed=8)
    norms = HeadNorms(
        random(head_dim, dtype=dtype, seed=9), random(head_dim, dtype=dtype, seed=10), q_heads, EPS
    )
    wanted = torch.stack(
        [
            operators.rms_norm(heads[:, h], norms.q_weight if h < q_heads else norms.k_weight, EPS)
            for h in range(5)
        ],
        dim=1,
    )
    operators.rotate(wanted, angles.cos(), angles.sin())
    assert operators.rotate(heads, angles.cos(), angles.sin(), norms) is heads
    assert torch.equal(heads, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_silu_mul(operators: Operators, dtype: torch.dtype, width: int, rows: int) -> None:
    gate_up = random(rows, 2 * width, dtype=dtype, seed=11, scale=4.0)
    gate, up = gate_up.double().chunk(2, dim=-1)
    wanted = (gate * gate.sigmoid() * up).to(dtype)
    for given_rows in (gate_up, strided(gate_up)):
        got = operators.silu_mul(given_rows)
        assert got.is_contiguous()
        # torch rounds silu(gate) to the type as well
        assert_near(got, wanted, ulps=8 if dtype == torch.float32 else 1 + (operators is TORCH))


def test_silu_over_the_whole_range(native: CpuOperators) -> None:
    gate = torch.cat([torch.linspace(-87, 87, 40001), torch.tensor([-1e-30, 1e-30, 0.0, 3e38])])
    got = native.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    wanted = gate.double() * gate.double().sigmoid()
    assert ((got - wanted).abs() <= 4e-7 * wanted.abs()).all()
    # further down torch, whose exponential runs to denormals, has numbers below 1e-35 where these are 0
    far = torch.tensor([-88.0, -89.0, -100.0, -1e10, -3e38])
    assert (native.silu_mul(torch.cat([far, torch.ones_like(far)])[None]).abs() < 1e-35).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_pass_through(native: CpuOperators, dtype: torch.dtype) -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0] * 5, dtype=dtype)
    gate_up = torch.cat([odd, torch.full_like(odd, 2.0)])[None]
    assert_near(native.silu_mul(gate_up), TORCH.silu_mul(gate_up))
    weight = torch.ones_like(odd)
    for i in range(len(odd)):  # each alone in a row of numbers
        row = torch.ones(1, len(odd), dtype=dtype)
        row[0, i] = odd[i]
        assert_near(native.rms_norm(row, weight, EPS), TORCH.rms_norm(row, weight, EPS))
        one, other = row.clone(), row.clone()
        got = native.add_rms_norm(one, row, weight, EPS)
        assert_near(got, TORCH.add_rms_norm(other, row, weight, EPS))
        assert_near(one, other, ulps=0)
    angles = torch.full((1, 15), 0.3)
    heads = odd[None, None].clone()
    wanted = TORCH.rotate(heads.clone(), angles.cos(), angles.sin())
    assert_near(native.rotate(heads, angles.cos(), angles.sin()), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_read_and_rounded(native: CpuOperators, dtype: torch.dtype) -> None:
    """Adding zero gives every number back, and adding in general rounds as torch does.

    But for denormals of bfloat16, below 1.2e-38, which the rounding instruction of some CPUs makes zero.
    """
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    weight = torch.ones(everything.shape[1], dtype=dtype)
    for delta in (torch.zeros_like(everything), everything.flip(1), everything.roll(12345, dims=1)):
        hidden = everything.clone()
        native.add_rms_norm(hidden, delta, weight, EPS)
        assert_near(hidden, everything + delta, ulps=0, slack=1.2e-38 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("two_threads")
def test_threads_and_other_rows_change_nothing(native: CpuOperators, dtype: torch.dtype) -> None:
    rows, width = 70, 2048
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype)
    delta, angles = x.flip(0), random(rows, 32, dtype=torch.float32)

    def results(part: slice) -> list[Tensor]:
        hidden = x[part].clone()
        heads = x[part].clone().view(-1, width // 64, 64)
        return [
            native.rms_norm(x[part], weight, EPS),
            native.add_rms_norm(hidden, delta[part], weight, EPS),
            hidden,
            native.rotate(heads, angles[part].cos(), angles[part].sin()),
            native.silu_mul(x[part]),
            native.argmax(x[part]),
        ]

    together = results(slice(None))
    torch.set_num_threads(1)
    for row in (0, 33, 69):
        for alone, among in zip(results(slice(row, row + 1)), together, strict=True):
            assert torch.equal(alone[0], among[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33, 1023, 1024, 1025, 5000])
def test_argmax_of_random_rows(native: CpuOperators, dtype: torch.dtype, width: int) -> None:
    logits = random(9, width, dtype=dtype, seed=12)
    for given_rows in (logits, strided(logits), logits[:0], logits[:1]):
        got = native.argmax(given_rows)
        assert got.dtype == torch.int64 and torch.equal(got, given_rows.argmax(-1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.5, math.inf, math.nan]), min_size=1, max_size=80
    ),
    st.sampled_from([1, 30, 1000, 1025]),
    st.sampled_from(DTYPES),
)
def test_argmax_takes_the_first_of_equals_and_of_nans(
    native: CpuOperators, values: list[float], stretch: int, dtype: torch.dtype
) -> None:
    """Equals and NaNs in all places of a vector and of a block, near and far from each other."""
    row = torch.tensor(values, dtype=dtype)
    apart = torch.full((len(values) * stretch,), -math.inf, dtype=dtype)
    apart[::stretch] = row
    for logits in (row[None], apart[None]):
        wanted = logits.float().argmax(-1)
        assert torch.equal(native.argmax(logits), wanted)
        assert torch.equal(TORCH.argmax(logits), wanted)
