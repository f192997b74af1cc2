"""`python -m tests.ops.compile_kernels CAPABILITY`: compiles the kernels of the operators without a GPU."""

from __future__ import annotations

import sys
from typing import Any

from seesaw.ops import triton_kernels as kernels
from tests.compile_triton import access_bytes

NORM = {"rows": "i32", "columns": "i32", "x_stride": "i32", "delta_stride": "i32", "eps": "fp32"}
ROTATE = {"count": "i32", "q_heads": "i32", "row_stride": "i32", "head_stride": "i32", "eps": "fp32"}
ARGMAX = {"columns": "i32", "row_stride": "i32", "part": "i32", "parts": "i32"}


def main(capability: int) -> None:
    """Every kernel as decode and prefill of an 8B model launch it: all accesses but single results take 16 bytes."""
    half, wide = "*bf16", "*fp32"

    def compiled(
        kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, *odd: str
    ) -> None:
        aligned = [name for name, kind in types.items() if kind != "fp32" and name not in odd]
        found = access_bytes(kernel, types, constants, aligned=aligned, warps=warps, capability=capability)
        assert all(size == 16 for size in found[:-1]), (kernel.__name__, constants, found)
        print("compiled", kernel.__name__, found)

    rows = dict.fromkeys(("x", "delta", "weight", "out"), half)
    compiled(kernels.norm_rows, {**rows, **NORM}, {"ADD": True, "ROWS": 1, "COLUMNS": 4096}, 8, "rows")
    compiled(kernels.norm_rows, {**rows, **NORM}, {"ADD": False, "ROWS": 1, "COLUMNS": 8192}, 16, "rows")
    heads = {"heads": half, "cos": wide, "sin": wide, "q_weight": half, "k_weight": half, **ROTATE}
    for norm, size in ((True, 64), (False, 40)):
        tile = {"NORM": norm, "HALF": size, "HEADS": 16, "CHANNELS": 64}
        compiled(kernels.rotate_heads, heads, tile, 4, "count", "q_heads")
    pair = {"gate_up": half, "out": half, "columns": "i32", "row_stride": "i32"}
    compiled(kernels.silu_mul_rows, pair, {"BLOCK": 1024}, 4)
    for kind in (half, wide):
        logits = {"logits": kind, "out": "*i64", **ARGMAX}
        compiled(kernels.argmax_parts, logits, {"LAST": kind == half, "BLOCK": 2048}, 4, "parts")
    # Triton makes constants of arguments that are 1: one row, one head, one column
    one_row = {name: kind for name, kind in {**rows, **NORM}.items() if name not in ("rows", "columns")}
    single = {"rows": 1, "columns": 1, "ADD": True, "ROWS": 1024, "COLUMNS": 1}
    access_bytes(kernels.norm_rows, one_row, single, capability=capability)
    one_head = {name: kind for name, kind in heads.items() if name not in ("count", "q_heads")}
    single = {"count": 1, "q_heads": 1, "NORM": True, "HALF": 1, "HEADS": 1, "CHANNELS": 1}
    access_bytes(kernels.rotate_heads, one_head, single, capability=capability)
    one_column = {"logits": half, "out": "*i64", "row_stride": "i32"}
    single = {"columns": 1, "part": 1, "parts": 1, "LAST": True, "BLOCK": 1}
    access_bytes(kernels.argmax_parts, one_column, single, capability=capability)
    parts = {"winners": "*i64", "out": "*i64", "parts": "i32"}
    access_bytes(kernels.argmax_of_parts, parts, {"PARTS": 64}, warps=1, capability=capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
