"""Compiles Triton kernels to machine code where no GPU is, and looks at how they access memory."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")


def access_bytes(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Collection[str] = (),
    warps: int = 4,
    capability: int = 80,
) -> list[int]:
    """Compile `kernel` and return the bytes a thread moves at each access to memory, in order of the code.

    `types` are those of the arguments that are not in `constants`, `aligned` those that 16 divides.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = [kernel.arg_names.index(name) for name in aligned]
    source = ASTSource(
        kernel, signature, dict(constants), {(place,): [["tt.divisibility", 16]] for place in places}
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    found = _ACCESS.findall(made.asm["ptx"])
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]
