"""Compiles the Triton kernels for a GPU that need not be here; says what they take. Run as a module, see `main`."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seesaw.attention import triton_decode, triton_prefill

_POINTERS = {
    "partial": "*fp32",
    "levels": "*fp32",
    **dict.fromkeys(("bases", "query_starts", "context_starts", "block_tables"), "*i32"),
}
_UNALIGNED = ("sequences", "table_width", "slots", "scale")


def main() -> None:
    """Arguments: compute capability without its point, and bf16 or fp32. Prints one line of JSON a kernel."""
    capability, kind = int(sys.argv[1]), sys.argv[2]
    size = 2 if kind == "bf16" else 4
    operand = tl.bfloat16 if kind == "bf16" else tl.float32
    for head_dim, group, window in ((128, 4, 0), (80, 1, 512)):
        shape = {
            "KV_HEADS": 8,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": 16,
            "WINDOW": window,
            "SEQUENCES": 64,
            "CHANNELS": 128,
            "OPERAND": operand,
            "WIDE": False,
        }
        tile = triton_decode.decode_tile(head_dim, size)
        decode = {**shape, "ROWS": 16, "TILE": tile, "CHUNK_TILES": 256 // tile}
        _compile(triton_decode._decode, decode, capability, kind, 4, 2)
        rows, tile, warps, stages = triton_prefill._launch(head_dim, size)
        prefill = {**shape, "PADDED": group, "QUERIES": rows // group, "TILE": tile}
        _compile(triton_prefill._prefill, prefill, capability, kind, warps, stages)


def _compile(
    kernel: Any, constants: dict[str, Any], capability: int, kind: str, warps: int, stages: int
) -> None:
    names = kernel.arg_names
    types = {**dict.fromkeys(("q", "pool", "out"), f"*{kind}"), **_POINTERS, "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name not in _UNALIGNED]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "shared": compiled.metadata.shared,
                "asynchronous copies": len(re.findall(r"cp\.async\.\w+\.shared", ptx)),
                "tensor core products": len(re.findall(r"mma\.sync|wgmma\.mma", ptx)),
                "bytes of code": len(compiled.asm["cubin"]),
            }
        )
    )


if __name__ == "__main__":
    main()
