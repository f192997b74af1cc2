"""What the Triton operators must compute, for the interpreter and for a GPU alike: each against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seesaw.ops import triton_ops
from seesaw.ops.base import HeadNorms
from seesaw.ops.triton_ops import TritonOperators
from tests.ops.numbers import DTYPES, EPS, assert_near, exact_norm, random, strided, ulps_of

OPERATORS = TritonOperators()


def ulps(dtype: torch.dtype) -> int:
    return 2 * ulps_of(dtype)  # a GPU's root, exponential and quotient are within 2 units each


class Cases:
    """Mixed into a test class."""

    device = "cpu"

    def place(self, x: Tensor) -> Tensor:
        """`x` on the device, with its strides."""
        if self.device == "cpu" or not x.numel():
            return x.to(self.device)
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.as_strided((last + 1,), (1,)).to(self.device).as_strided(x.shape, x.stride())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("rows", "width"), [(0, 8), (1, 1), (7, 5), (3, 64), (5, 1000), (2, 4096), (1, 9001)]
    )
    def test_norms(self, dtype: torch.dtype, rows: int, width: int) -> None:
        hidden, delta = (random(rows, width, dtype=dtype, seed=seed, scale=3.0) for seed in (2, 3))
        weight = random(width, dtype=dtype, seed=1)
        total = hidden + delta  # rounded to the type
        for shape in (torch.clone, strided):
            alone = OPERATORS.rms_norm(self.place(shape(total)), self.place(weight), EPS)
            changed, unchanged = self.place(shape(hidden)), self.place(shape(delta))
            got = OPERATORS.add_rms_norm(changed, unchanged, self.place(weight), EPS)
            assert torch.equal(changed.cpu(), total) and torch.equal(unchanged.cpu(), delta)
            assert torch.equal(got, alone) and got.is_contiguous()
            assert_near(got.cpu(), exact_norm(total, weight), ulps=ulps(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [2, 10, 64, 80, 128])
    @pytest.mark.parametrize(("rows", "count"), [(0, 3), (1, 1), (3, 6), (2, 21)])
    def test_rotation(self, dtype: torch.dtype, rows: int, count: int, head_dim: int) -> None:
        packed = random(rows, count + 2, head_dim, dtype=dtype, seed=5)
        wanted, angles = turned(packed[:, :count], head_dim)
        given = self.place(packed)
        heads = given[:, :count]  # rows are strided
        assert OPERATORS.rotate(heads, self.place(angles.cos()), self.place(angles.sin())) is heads
        # where a difference nearly cancels, the error is that of its terms
        assert_near(heads.cpu(), wanted, slack=1e-6)
        assert torch.equal(given[:, count:].cpu(), packed[:, count:])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("q_heads", [0, 3, 5])
    @pytest.mark.parametrize("head_dim", [6, 64, 80])
    def test_rotation_with_norms(self, dtype: torch.dtype, q_heads: int, head_dim: int) -> None:
        heads = random(3, 5, head_dim, dtype=dtype, seed=7, scale=2.0)
        q_weight, k_weight = (random(head_dim, dtype=dtype, seed=seed) for seed in (9, 10))
        normed = torch.stack(
            [exact_norm(heads[:, h], q_weight if h < q_heads else k_weight) for h in range(5)], dim=1
        )
        wanted, angles = turned(normed, head_dim)
        norms = HeadNorms(self.place(q_weight), self.place(k_weight), q_heads, EPS)
        got = OPERATORS.rotate(self.place(heads), self.place(angles.cos()), self.place(angles.sin()), norms)
        # a norm that lies between two numbers of the type may be rounded to either: a unit of the larger term
        slack = float(normed.abs().max()) * torch.finfo(dtype).eps * 1.01
        assert_near(got.cpu(), wanted, slack=slack * (4 if dtype == torch.float32 else 1))
        same = torch.isclose(got.cpu().double(), wanted.double(), rtol=0, atol=1e-5)
        assert same.double().mean() > 0.97  # and it is rare: the norm is rounded as it would be alone

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "width"), [(0, 8), (7, 1), (3, 31), (2, 1024), (2, 2500)])
    def test_silu_mul(self, dtype: torch.dtype, rows: int, width: int) -> None:
        gate_up = random(rows, 2 * width, dtype=dtype, seed=11, scale=4.0)
        gate, up = gate_up.double().chunk(2, dim=-1)
        wanted = (gate * gate.sigmoid() * up).to(dtype)
        for shape in (torch.clone, strided):
            got = OPERATORS.silu_mul(self.place(shape(gate_up)))
            assert got.is_contiguous()
            assert_near(got.cpu(), wanted, ulps=ulps(dtype))

    def test_silu_over_the_whole_range(self) -> None:
        gate = torch.cat([torch.linspace(-87, 87, 4001), torch.tensor([-1e-30, 1e-30, 0.0, 3e38])])
        got = OPERATORS.silu_mul(self.place(torch.cat([gate, torch.ones_like(gate)])[None]))[0].cpu()
        wanted = gate.double() * gate.double().sigmoid()
        # an exponential by powers of two loses as many units as its argument is large
        assert ((got - wanted).abs() <= 1e-5 * wanted.abs()).all()
        far = torch.tensor([-100.0, -1e10, -3e38])
        assert (
            OPERATORS.silu_mul(self.place(torch.cat([far, torch.ones_like(far)])[None])).abs() < 1e-35
        ).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("programs", [1, 1024])
    @pytest.mark.parametrize("shape", [(1, 1), (9, 7), (3, 2048), (3, 2049), (2, 9000)])
    def test_argmax_of_random_rows(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int], programs: int
    ) -> None:
        """In one part a row, and in as many as there can be."""
        monkeypatch.setattr(triton_ops, "_ARGMAX_PROGRAMS", programs)
        logits = random(*shape, dtype=dtype, seed=12)
        for rows in (logits, strided(logits), logits[:0]):
            got = OPERATORS.argmax(self.place(rows)).cpu()
            assert got.dtype == torch.int64 and torch.equal(got, rows.float().argmax(-1))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("programs", [1, 1024])
    def test_argmax_takes_the_first_of_equals_and_of_nans(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, programs: int
    ) -> None:
        monkeypatch.setattr(triton_ops, "_ARGMAX_PROGRAMS", programs)
        odd = [-math.inf, -2.0, -0.0, 0.0, 1.0, math.inf, math.nan]
        chance = torch.Generator().manual_seed(3)
        for width in (5, 2048, 5000):
            rows = torch.full((25, width), -math.inf)
            for row in rows[1:]:
                places = torch.randint(width, (6,), generator=chance)
                values = torch.randint(len(odd), (6,), generator=chance)
                row[places] = torch.tensor([odd[v] for v in values])
            wanted = rows.argmax(-1)
            assert torch.equal(OPERATORS.argmax(self.place(rows.to(dtype))).cpu(), wanted)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_infinity_and_nan_pass_through(self, dtype: torch.dtype) -> None:
        odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0] * 2, dtype=dtype)
        gate = odd.double()
        wanted = (gate / (1 + (-gate).exp()) * 2).to(dtype)
        gate_up = torch.cat([odd, torch.full_like(odd, 2.0)])[None]
        assert_near(OPERATORS.silu_mul(self.place(gate_up)).cpu(), wanted[None])
        rows = torch.ones(len(odd), len(odd), dtype=dtype)
        rows.diagonal().copy_(odd)  # each alone in a row of numbers
        weight = torch.ones_like(odd)
        assert_near(
            OPERATORS.rms_norm(self.place(rows), self.place(weight), EPS).cpu(), exact_norm(rows, weight)
        )
        changed = self.place(torch.zeros_like(rows))
        OPERATORS.add_rms_norm(changed, self.place(rows), self.place(weight), EPS)
        assert_near(changed.cpu(), rows, ulps=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_other_rows_change_nothing(self, dtype: torch.dtype) -> None:
        """Bit for bit, whatever else is in the batch."""
        x, weight = self.place(random(33, 512, dtype=dtype)), self.place(random(512, dtype=dtype, seed=1))
        angles = self.place(random(33, 32, dtype=torch.float32))

        def results(part: slice) -> list[Tensor]:
            hidden, heads = x[part].clone(), x[part].clone().view(-1, 8, 64)
            return [
                OPERATORS.rms_norm(x[part], weight, EPS),
                OPERATORS.add_rms_norm(hidden, x.flip(0)[part], weight, EPS),
                OPERATORS.rotate(heads, angles[part].cos(), angles[part].sin()),
                OPERATORS.silu_mul(x[part]),
                OPERATORS.argmax(x[part]),
            ]

        together = results(slice(None))
        for row in (0, 17, 32):
            for alone, among in zip(results(slice(row, row + 1)), together, strict=True):
                assert torch.equal(alone[0], among[row])

    def test_operands_that_do_not_fit_are_refused(self) -> None:
        x, weight = self.place(torch.ones(3, 8)), self.place(torch.ones(8))
        angles = self.place(torch.ones(3, 4))
        for wrong in (
            lambda: OPERATORS.rms_norm(x, weight[1:], EPS),
            lambda: OPERATORS.rms_norm(x, weight.bfloat16(), EPS),
            lambda: OPERATORS.rms_norm(x.t(), weight[:3], EPS),
            lambda: OPERATORS.add_rms_norm(x, x[:2], weight, EPS),
            lambda: OPERATORS.rotate(x.view(3, 1, 8), angles[:2], angles),
            lambda: OPERATORS.rotate(x.view(3, 1, 8), angles.double(), angles),
            lambda: OPERATORS.silu_mul(x[:, 1:]),
        ):
            with pytest.raises(AssertionError):
                wrong()


def turned(heads: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """`heads` `[M, H, head_dim]` rotated in float64 and rounded once, and the angles `[M, head_dim / 2]`."""
    angles = random(len(heads), head_dim // 2, dtype=torch.float32, seed=6, scale=9.0)
    first, second = heads.double().chunk(2, dim=-1)
    c, s = angles.cos().double()[:, None], angles.sin().double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(heads.dtype), angles
