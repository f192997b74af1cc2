"""Tests of Triton kernels, which are interpreted on CPU tensors (`conftest.py` sees to it).

Import this before the kernels: without Triton it skips. With `TRITON_INTERPRET=0` in the environment kernels are
compiled instead, for the tests marked `gpu`; those that need the interpreter are skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"


def skip_unless_interpreting() -> None:
    """Skip the module that calls this where kernels are compiled."""
    if not INTERPRETING:
        pytest.skip("kernels are compiled in this process", allow_module_level=True)


def needs_compiled_kernels() -> pytest.MarkDecorator:
    """Mark of tests that need a GPU, and kernels that are compiled for it."""
    import torch

    if INTERPRETING:
        return pytest.mark.skip(reason="kernels are interpreted in this process; set TRITON_INTERPRET=0")
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _round_like_a_gpu() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, and loses its denormals; a GPU rounds to nearest even."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.array(source.data, dtype=np.float32))
            data = wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        elif kinds == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return plain(self, source, target)
        return interpreter.TensorHandle(data, target.scalar)

    builder.cast_impl = cast


if INTERPRETING:
    _round_like_a_gpu()
