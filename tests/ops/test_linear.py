"""Matrix products on CPUs: the native kernels against float64, their determinism, and when torch does it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import cast

import pytest
import torch
from torch import Tensor

from seesaw.ops.cpu_linear import CpuLinear
from seesaw.ops.torch_ops import TorchOperators

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# (M, N, K): every height and remainder of a tile, one span of K and several, rows no multiple of anything
SHAPES = [
    *((rows, 61, 200) for rows in (*range(1, 14), 64)),
    *((rows, columns, 96) for rows in (1, 2, 3, 4, 6) for columns in (1, 2, 5, 13, 25)),
    *((7, 10, depth) for depth in (1, 2, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2048, 5001)),
    *((rows, 29, 2100) for rows in (1, 3, 6, 25)),
    (300, 70, 1100),
    (700, 1100, 300),
    (1, 1, 1),
    (9, 400, 64),
]


@pytest.fixture(scope="module")
def linear(library: ctypes.CDLL) -> CpuLinear:
    return CpuLinear(library)


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * 7 + columns * 3 + depth)
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth) / depth**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


@pytest.fixture(params=[False, True], ids=["as they lie", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def assert_rounded_once(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`got` is within the error of a float32 sum of the exact product, and of one rounding to its type."""
    wanted, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        wanted, sizes = wanted + bias.double(), sizes + bias.double().abs()
    rounding = 0.0 if got.dtype == torch.float32 else 0.5 * torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    allowed = (wanted.abs() * rounding + sizes * 4e-6) * 1.01 + tiny
    assert ((got.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_products_equal_float64(
    linear: CpuLinear, shape: tuple[int, int, int], dtype: torch.dtype, packed: bool
) -> None:
    x, weight, bias = operands(*shape, dtype)
    assert_rounded_once(linear.native(x, weight, packed=packed), x, weight)
    assert_rounded_once(linear.native(x, weight, bias, packed=packed), x, weight, bias)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_may_be_strided_and_their_surroundings_anything(
    linear: CpuLinear, dtype: torch.dtype, packed: bool
) -> None:
    """What lies between rows and behind them, NaN included, is neither read into a sum nor written."""
    for depth in (40, 37, 1030):
        rows, columns = 5, 11
        x, weight, bias = operands(rows, columns, depth, dtype)
        wide_x, wide_weight = (
            torch.full((m.shape[0], depth + 9), torch.nan, dtype=dtype) for m in (x, weight)
        )
        wide_x[:, 1 : depth + 1], wide_weight[:, 3 : depth + 3] = x, weight
        around = torch.full((rows * columns + 40,), 7.0, dtype=dtype)
        out = around[20 : 20 + rows * columns].view(rows, columns)
        strided = wide_x[:, 1 : depth + 1], wide_weight[:, 3 : depth + 3]
        result = linear.native(*strided, bias, out=out, packed=packed)
        assert result is out and torch.equal(out, linear.native(x, weight, bias, packed=packed))
        assert (around[:20] == 7).all() and (around[20 + rows * columns :] == 7).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_depends_on_nothing_beside_it(linear: CpuLinear, dtype: torch.dtype, packed: bool) -> None:
    x, weight, bias = operands(141, 131, 2500, dtype)
    whole = linear.native(x, weight, bias, packed=packed)
    for first, last in ((0, 1), (1, 3), (3, 6), (5, 9), (100, 141), (17, 90)):
        assert torch.equal(linear.native(x[first:last], weight, bias, packed=packed), whole[first:last])
    for first, last in ((0, 1), (1, 131), (50, 57)):
        some = linear.native(x, weight[first:last], bias[first:last], packed=packed)
        assert torch.equal(some, whole[:, first:last])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads_make_no_difference(linear: CpuLinear, dtype: torch.dtype, packed: bool) -> None:
    threads = torch.get_num_threads()
    try:
        for shape in ((5, 700, 1500), (90, 55, 300), (400, 300, 2100), (3000, 40, 60)):
            x, weight, bias = operands(*shape, dtype)
            results = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results.append(linear.native(x, weight, bias, packed=packed))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_infinities_and_nan_go_through(linear: CpuLinear, dtype: torch.dtype, packed: bool) -> None:
    x, weight, _ = operands(6, 9, 50, dtype)
    x[1, 3], x[2, 49], weight[4, 0] = torch.nan, torch.inf, torch.inf
    got = linear.native(x, weight, packed=packed)
    assert torch.equal(got.isnan(), (x.float() @ weight.float().T).isnan())
    assert got[1].isnan().all() and got[2].isinf().any() and got[0, :4].isfinite().all()


def test_every_choice_gives_the_product(linear: CpuLinear) -> None:
    for dtype in (*TYPES, torch.float64):
        for rows in (1, linear.packed_rows - 1, linear.packed_rows):
            x, weight, bias = operands(rows, 30, 48, dtype)
            for addend in (bias, None):
                out = torch.empty(rows, 30, dtype=dtype)
                assert linear(x, weight, addend, out=out) is out
                assert torch.equal(out, linear(x, weight, addend))
                assert torch.allclose(
                    out,
                    TorchOperators().linear(x, weight, addend),
                    atol=5e-2 if dtype.itemsize == 2 else 1e-5,
                )


def test_the_number_of_rows_chooses_the_kernel(linear: CpuLinear) -> None:
    """A product of one type is the same in both ways but for its rounding, and so tells which one was taken."""
    x, weight, _ = operands(linear.packed_rows, 300, 900, torch.float32)
    for rows in (linear.packed_rows - 1, linear.packed_rows):
        ways = [linear.native(x[:rows], weight, packed=packed) for packed in (False, True)]
        assert not torch.equal(*ways)
        assert torch.equal(linear.native(x[:rows], weight), ways[rows >= linear.packed_rows])


def test_types_that_the_cpu_has_better_means_for_are_left_to_torch(library: ctypes.CDLL) -> None:
    class Better:
        def __getitem__(self, name: str) -> object:
            return _Function(0b010) if name == "seesaw_linear_better" else library[name]

    linear = CpuLinear(cast(ctypes.CDLL, Better()))
    assert not linear.is_native(torch.bfloat16) and not linear.is_native(torch.float64)
    assert linear.is_native(torch.float32) and linear.is_native(torch.float16)
    x, weight, bias = operands(9, 30, 48, torch.bfloat16)
    assert torch.equal(linear(x, weight, bias), TorchOperators().linear(x, weight, bias))


class _Function:
    """Stands for a function of the library that returns `value`."""

    argtypes: tuple[object, ...] = ()
    restype: object = None

    def __init__(self, value: int) -> None:
        self._value = value

    def __call__(self) -> int:
        return self._value


BEFORE_A_WALL = """
import ctypes, mmap, torch
from seesaw.native.build import load
from seesaw.ops.cpu_linear import CpuLinear

libc = ctypes.CDLL(None)

def walled(matrix):  # its last element lies before a page that cannot be read
    size = -(-matrix.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    count = matrix.numel()
    copy = torch.frombuffer(memory, dtype=matrix.dtype, count=count, offset=size - matrix.nbytes)
    return copy.view(matrix.shape).copy_(matrix)

linear = CpuLinear(load())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, columns, depth in ((7, 13, 50), (100, 61, 257), (96, 64, 256)):
        x, weight = (torch.randn(n, depth).to(dtype) for n in (rows, columns))
        for packed in (False, True):
            linear.native(walled(x), walled(weight), packed=packed)
print("done")
"""


def test_nothing_is_read_behind_the_operands(library: ctypes.CDLL) -> None:
    run = subprocess.run([sys.executable, "-c", BEFORE_A_WALL], capture_output=True, text=True)
    assert run.stdout.split() == ["done"], (run.returncode, run.stderr)


def test_empty_products(linear: CpuLinear) -> None:
    for dtype in TYPES:
        x, weight, bias = operands(3, 8, 16, dtype)
        assert linear(x[:0], weight, bias).shape == (0, 8)
        assert linear(x, weight[:0]).shape == (3, 0)
        assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.expand(3, 8))


def test_operands_that_do_not_fit_are_refused(linear: CpuLinear) -> None:
    x, weight, bias = operands(3, 8, 16, torch.bfloat16)
    for wrong in (
        (x.float(), weight, bias),
        (x, weight[:, 1:], bias),
        (x, weight, bias[1:]),
        (x.T, weight, bias),
    ):
        with pytest.raises(AssertionError):
            linear.native(*wrong)
    with pytest.raises(AssertionError):
        linear.native(x, weight, out=torch.empty(3, 16, dtype=x.dtype)[:, ::2])
