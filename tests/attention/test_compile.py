"""The Triton kernels compile for every kind of GPU that is supported, and fit into it. Needs none of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# not imported here: this process may go on to run kernels in the interpreter, which is decided before the import
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program can have, by compute capability."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_and_fit(capability: int, kind: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.attention.compile_kernels", str(capability), kind],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in found] == ["_decode", "_prefill"] * 2
    for kernel in found:
        assert kernel["shared"] <= SHARED[capability] and kernel["bytes of code"]
        if kind == "bf16":
            assert kernel["asynchronous copies"] and kernel["tensor core products"]
