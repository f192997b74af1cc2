"""Boxes of weights by the Triton kernel, interpreted: every bit and nothing beside; and that it compiles for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from tests import triton_interpreter

triton_interpreter.skip_unless_interpreting()

from seesaw.weights.triton_copies import copy_rows  # noqa: E402 - behind the interpreter's switch

TYPES = (torch.float32, torch.bfloat16, torch.float16)
BOXES = [
    # shape of the source, its box, shape of the target, place of the box: rows, columns
    ((40, 64), (0, 40, 16, 32), (40, 16), (0, 0)),  # a quarter of every row
    ((40, 64), (3, 37, 24, 56), (50, 80), (7, 40)),
    ((9, 7), (1, 8, 2, 5), (8, 6), (1, 3)),  # nothing divides anything
    ((300, 5), (0, 300, 4, 5), (300, 1), (0, 0)),
    ((1, 9001), (0, 1, 3, 9000), (2, 9000), (1, 2)),
    ((3, 9000), (0, 3, 0, 9000), (3, 9000), (0, 0)),  # rows of several tiles
    ((2, 8), (0, 0, 0, 8), (2, 8), (0, 0)),
]


def cut(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    return x[top:bottom, left:right]


@pytest.mark.parametrize("dtype", [*TYPES, torch.uint8])
@pytest.mark.parametrize(("shape", "box", "room", "place"), BOXES)
@pytest.mark.parametrize("programs", [1, 3])
def test_a_box_is_copied_bit_for_bit_and_nothing_else(
    shape: tuple[int, int],
    box: tuple[int, int, int, int],
    room: tuple[int, int],
    place: tuple[int, int],
    dtype: torch.dtype,
    programs: int,
) -> None:
    """NaN of any payload among them."""
    source = torch.empty(shape, dtype=dtype)
    source.view(torch.uint8).random_(256)
    target = torch.full(room, 7, dtype=dtype)
    wanted, at = target.clone(), (place[0], place[0] + box[1] - box[0], place[1], place[1] + box[3] - box[2])
    cut(wanted, *at).copy_(cut(source, *box))
    copy_rows(cut(source, *box), cut(target, *at), programs=programs)
    assert torch.equal(target.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("stored", "compute"), [(a, b) for a, b in product(TYPES, repeat=2) if a != b])
@pytest.mark.parametrize("box", [(0, 40, 16, 32), (3, 37, 5, 18)])
def test_elements_are_converted_as_torch_does(
    stored: torch.dtype, compute: torch.dtype, box: tuple[int, int, int, int]
) -> None:
    source = torch.randn(40, 64)
    source[::3] *= 1e-6
    source[1::5] *= 1e5
    source = source.to(stored)
    height, width = box[1] - box[0], box[3] - box[2]
    target = torch.zeros(height, width + 3, dtype=compute)
    copy_rows(cut(source, *box), target[:, 1 : 1 + width])
    assert torch.equal(target[:, 1 : 1 + width], cut(source, *box).to(compute))
    assert not target[:, 0].any() and not target[:, 1 + width :].any()


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_bits_may_lie_anywhere(offset: int) -> None:
    """As parameters in a file may."""
    raw = torch.empty(4096, dtype=torch.uint8).random_(256)
    source = torch.frombuffer(raw.numpy(), dtype=torch.bfloat16, count=600, offset=offset).view(20, 30)
    target = torch.zeros(20, 10, dtype=torch.bfloat16)
    copy_rows(source[:, 10:20], target)
    assert torch.equal(target.view(torch.int16), source[:, 10:20].contiguous().view(torch.int16))


def test_what_is_not_in_rows_is_refused() -> None:
    for source, target in (
        (torch.ones(4, 8).t(), torch.ones(8, 4)),
        (torch.ones(4, 8), torch.ones(4, 16)[:, ::2]),
        (torch.ones(4, 8), torch.ones(8, 4)),
    ):
        with pytest.raises(AssertionError):
            copy_rows(source, target)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_and_moves_16_bytes_at_a_time(capability: int) -> None:
    """To machine code, without a GPU, in a process of its own, since this one interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.compile_copies", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
