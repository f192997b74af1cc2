"""Prefill, decode and host copies of one GPU beside the bounds that the same run measures.

    python benchmarks/gpu_steps.py                                # prints a Markdown record
    python benchmarks/gpu_steps.py --output benchmarks/results/   # writes it there, by date and GPU

An 8B Llama with random bfloat16 weights, under plan T1 on the first visible GPU. Prefill: prompts of 2,048 tokens,
its arithmetic over the rate of a large matrix product. Decode: 256 sequences of 960 tokens that get 128 more, so
1,024 on the mean; a step's weights and KV over the rate at which a large copy reads and writes. The step is what 128
more tokens take, by two runs, so prefill is no part of it. Host copies: KV blocks in random order over one large copy
by the driver. With --peer, the decode job also goes through transformers' continuous batching. On smaller GPUs decode
takes the sequences that fit, and says so. Exit code 3 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PREFILL_PROMPTS, PREFILL_TOKENS = 64, 2048
SEQUENCES, PROMPT, OUTPUT = 256, 960, 128
GOALS = {"prefill": 0.65, "decode": 0.75, "copies": 0.85}


# ---- the model's work ----------------------------------------------------------------------------------------


def layer_weights(config: dict[str, Any]) -> int:
    """Elements of all layers' matrices."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    return int(config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"]))


def prefill_flops(config: dict[str, Any], prompts: int, tokens: int) -> float:
    """Of matrices and causal attention, and of the LM head for the last token of each prompt."""
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"] * pairs
    head = 2 * config["hidden_size"] * config["vocab_size"]
    return float(prompts * (2 * layer_weights(config) * tokens + attention + head))


def decode_bytes(config: dict[str, Any], sequences: int, context: float, width: int = 2) -> float:
    """Read by a step: matrices, LM head, and the KV of every sequence."""
    matrices = layer_weights(config) + config["hidden_size"] * config["vocab_size"]
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * context
    return float(width * (matrices + sequences * kv))


# ---- bounds, each in a process of its own that leaves no memory behind ----------------------------------------


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The fastest of several calls, by events of the device."""
    import torch

    call()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def bounds() -> dict[str, Any]:
    """The GPU, its rate of bfloat16 products (flops/s), bandwidth and links (bytes/s)."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    product = seconds(lambda: torch.mm(a, b))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source))
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    return {
        "gpu": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "flops": 2 * size**3 / product,
        "bandwidth": 2 * source.numel() / copy,
        "to_host": host.numel() / seconds(lambda: host.copy_(source, non_blocking=True)),
        "to_device": host.numel() / seconds(lambda: target.copy_(host, non_blocking=True)),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def kv_copies() -> dict[str, Any]:
    """Bytes per second of KV blocks, in random order, between the pool and the engine's host buffer."""
    import torch

    from seesaw.kv.host_buffer import HostBuffer
    from seesaw.kv.registered import HostRegistration
    from seesaw.kv.transfers import block_table, swap_in, swap_out

    torch.cuda.init()
    blocks, layers, heads, tokens, dim = 512, 32, 8, 16, 128  # 1 GiB
    buffer = HostBuffer.create(blocks, layers, heads, tokens, dim, torch.bfloat16)
    pool = torch.zeros(blocks, layers, 2, heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
    with HostRegistration(buffer.tensor) as registration:
        pairs = torch.stack([torch.randperm(blocks), torch.randperm(blocks)], 1)
        table = block_table(pairs, pool, buffer.tensor)
        where: dict[str, Any] = {
            "layers": range(layers),
            "kv_heads": range(heads),
            "copy": registration.copy_slabs,
        }
        return {
            "registered": registration.registered,
            "to_host": pool.nbytes / seconds(lambda: swap_out(pool, buffer.tensor, table, **where)),
            "to_device": pool.nbytes / seconds(lambda: swap_in(pool, buffer.tensor, table, **where)),
        }


# ---- the engine, and its peer ---------------------------------------------------------------------------------


def prompts_of(count: int, tokens: int) -> list[list[int]]:
    """Token ids, different in every prompt."""
    return [[3 + (7919 * i + 31 * j) % 120_000 for j in range(tokens)] for i in range(count)]


def engine_steps(folder: str, sequences: int) -> dict[str, float]:
    """Seconds of the prefill job and of a decode step, after a warm-up of each."""
    from seesaw import LLM, SamplingParams

    def timed(prompts: list[list[int]], output: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        begin = time.perf_counter()
        llm.generate(given, params)
        return time.perf_counter() - begin

    with LLM(
        folder,
        device="cuda",
        plan="T1",
        policy="prefill-first",
        load_format="dummy",
        dtype="bfloat16",
        tokenizer=False,
        max_running=sequences,
        max_model_len=PREFILL_TOKENS + 64,
        chunk=8192,
        start_timeout=900.0,
    ) as llm:
        long, short = prompts_of(PREFILL_PROMPTS, PREFILL_TOKENS), prompts_of(sequences, PROMPT)
        timed(long[:8], 1)
        timed(short, 8)
        prefill = min(timed(long, 1) for _ in range(3))
        once = min(timed(short, 1) for _ in range(2))
        whole = min(timed(short, 1 + OUTPUT) for _ in range(2))
    return {"prefill": prefill, "step": (whole - once) / OUTPUT, "job": whole}


def peer(sequences: int) -> dict[str, Any]:
    """The decode job by transformers' continuous batching on the same shape."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = dict(LLAMA_8B)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval()

    def timed(output: int) -> float:
        generation = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        begin = time.perf_counter()
        answers = model.generate_batch(inputs=prompts_of(sequences, PROMPT), generation_config=generation)
        found = sum(len(answer.generated_tokens) for answer in answers.values())
        assert found == sequences * output, (found, sequences * output)
        return time.perf_counter() - begin

    timed(8)
    return {"version": transformers.__version__, "job": timed(1 + OUTPUT)}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fitting(memory: int) -> int:
    """Sequences whose KV fits beside the weights, of the 256 wanted."""
    weights = 2 * (layer_weights(LLAMA_8B) + 2 * LLAMA_8B["hidden_size"] * LLAMA_8B["vocab_size"])
    each = decode_bytes(LLAMA_8B, 1, PROMPT + OUTPUT + 16) - decode_bytes(LLAMA_8B, 0, 0)
    return max(1, min(SEQUENCES, int((0.93 * memory - weights - (4 << 30)) / each)))


# ---- the record -----------------------------------------------------------------------------------------------


def table(
    found: dict[str, Any], steps: dict[str, float], copies: dict[str, Any], sequences: int
) -> list[str]:
    """Rows of the record: what, measured, bound, share, goal."""
    tokens = PREFILL_PROMPTS * PREFILL_TOKENS
    rate = prefill_flops(LLAMA_8B, PREFILL_PROMPTS, PREFILL_TOKENS) / steps["prefill"]
    moved = decode_bytes(LLAMA_8B, sequences, PROMPT + OUTPUT / 2) / steps["step"]
    rows = [
        "| what | measured | rate | bound | share | goal |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| prefill, {PREFILL_PROMPTS} prompts of {PREFILL_TOKENS:,} | {tokens / steps['prefill']:,.0f} tokens/s | "
        f"{rate / 1e12:.1f} Tflop/s | {found['flops'] / 1e12:.1f} | {rate / found['flops']:.1%} | "
        f"{GOALS['prefill']:.0%} |",
        f"| decode, batch {sequences}, context {PROMPT + OUTPUT // 2:,} | {sequences / steps['step']:,.0f} tokens/s, "
        f"{steps['step'] * 1e3:.2f} ms a step | {moved / 1e9:.0f} GB/s | {found['bandwidth'] / 1e9:.0f} | "
        f"{moved / found['bandwidth']:.1%} | {GOALS['decode']:.0%} |",
    ]
    for way in ("to_host", "to_device"):
        rows.append(
            f"| KV copies, {way.replace('_', ' ')} | 1 GiB in blocks | {copies[way] / 1e9:.1f} GB/s | "
            f"{found[way] / 1e9:.1f} | {copies[way] / found[way]:.1%} | {GOALS['copies']:.0%} |"
        )
    return rows


def commit() -> str:
    """Of the working tree, and whether it has changes."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=, with changes"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def record(with_peer: bool, suite: str) -> tuple[str, str]:
    """(the Markdown record, the GPU's name)."""
    found = alone(bounds)
    sequences = fitting(found["memory"])
    copies = alone(kv_copies)
    with tempfile.TemporaryDirectory(prefix="seesaw-gpu-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        steps = engine_steps(folder, sequences)
    lines = [
        f"# One GPU: {found['gpu']}, {datetime.date.today().isoformat()}",
        "",
        "Repeat with `scripts/gpu_check`. Bounds are measured in the same run; `benchmarks/gpu_steps.py` says how.",
        "",
        "| | |",
        "| --- | --- |",
        f"| GPU | {found['gpu']}, {found['memory'] / (1 << 30):.1f} GiB, compute capability {found['capability']} |",
        f"| seesaw | commit {commit()} |",
        f"| software | Python {platform.python_version()}, torch {found['torch']}, CUDA {found['cuda']} |",
        *([f"| GPU tests | {suite} |"] if suite else []),
        f"| host buffer | {'registered with CUDA' if copies['registered'] else 'staged'} |",
        "",
        "## An 8B Llama, random bfloat16 weights, plan T1",
        "",
        *table(found, steps, copies, sequences),
    ]
    if sequences < SEQUENCES:
        lines += ["", f"Batch {sequences} instead of {SEQUENCES}: more KV does not fit this GPU."]
    if with_peer:
        lines += ["", "## Beside transformers' continuous batching", "", *_beside(steps, sequences)]
    return "\n".join(lines) + "\n", found["gpu"]


def _beside(steps: dict[str, float], sequences: int) -> list[str]:
    ours = (
        f"{sequences} prompts of {PROMPT} tokens, {OUTPUT + 1} generated by each: Seesaw {steps['job']:.1f} s"
    )
    try:
        other = alone(peer, sequences)
    except Exception as error:  # whatever stops a peer, the record of our own figures stands
        return [f"{ours}; transformers did not finish: {type(error).__name__}: {str(error)[:200]}"]
    times = other["job"] / steps["job"]
    return [
        f"{ours}, transformers {other['version']} (sdpa) {other['job']:.1f} s, {times:.2f} times as long."
    ]


def main() -> int:
    """Measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the record; by default it is printed")
    parser.add_argument("--suite", default="", help="a line on the GPU tests, for the record")
    parser.add_argument("--peer", action="store_true", help="run transformers' continuous batching as well")
    options = parser.parse_args()
    from seesaw.core.errors import ConfigError
    from seesaw.device.gpus import require_cuda_build, visible_gpus

    try:
        require_cuda_build()
        visible_gpus()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    text, gpu = record(options.peer, options.suite)
    if options.output is None:
        sys.stdout.write(text)
        return 0
    name = "-".join(gpu.lower().replace("/", " ").split())
    path = options.output / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
