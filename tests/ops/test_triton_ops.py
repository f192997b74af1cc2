"""The fused Triton operators against float64, in Triton's interpreter; and that they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import triton_interpreter

triton_interpreter.skip_unless_interpreting()

from tests.ops import triton_cases  # noqa: E402 - behind the interpreter's switch


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
class TestInterpreted(triton_cases.Cases):
    """See `triton_cases`."""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_access_memory_in_16_bytes(capability: int) -> None:
    """Without a GPU, to machine code; in a process of its own, since this one interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 7, done.stdout
