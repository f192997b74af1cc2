"""Total tokens per second of several plans on one dummy model, in alternating rounds.

    python benchmarks/plans.py                                   # P2->T2 against T2, P2 and D2 on a small Llama
    python benchmarks/plans.py --plans 'P2->T2' T2 --requests 64 --tokens-in 512 --tokens-out 64 --json out.json

Each plan's engine starts afresh in each round, so that no plan profits from another's warm state; the clock runs from
the first request to the last answer. Quote ratios of medians: a single figure says more about the hour than the plan.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from seesaw import LLM, SamplingParams

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "270m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
    },
}
KV_HEADS = {"tiny": 2, "270m": 8, "1.1b": 4}


def write_config(folder: Path, shape: str) -> None:
    """The `config.json` of a Llama of this shape; its weights will be random."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **SHAPES[shape],
        "num_key_value_heads": KV_HEADS[shape],
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, plan: str, args: argparse.Namespace) -> float:
    """Prompt and output tokens per second of one run."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 32000) for _ in range(args.tokens_in)] for _ in range(args.requests)]
    params = SamplingParams(temperature=0, max_tokens=args.tokens_out, ignore_eos=True)
    with LLM(folder, plan=plan, load_format="dummy", host_kv=args.host_kv) as llm:
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        elapsed = time.perf_counter() - started
    return args.requests * (args.tokens_in + args.tokens_out) / elapsed


def main() -> None:
    """Run all plans in turn, several times; print medians and ratios to the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", nargs="+", default=["P2->T2", "T2", "P2", "D2"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens-in", type=int, default=256)
    parser.add_argument("--tokens-out", type=int, default=32)
    parser.add_argument("--host-kv", default="512MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures of every round to this file")
    args = parser.parse_args()
    figures: dict[str, list[float]] = {plan: [] for plan in args.plans}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.shape)
        for _ in range(args.rounds):
            for plan in args.plans:
                figures[plan].append(measure(Path(folder), plan, args))
    first = statistics.median(figures[args.plans[0]])
    print(f"{args.shape}: {args.requests} x {args.tokens_in} -> {args.tokens_out}, {args.rounds} rounds")
    for plan, values in figures.items():
        median = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{plan:>12}  {median:9,.0f} tokens/s  ({spread})  {args.plans[0]} is {first / median:.2f} x")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "figures": figures}, default=str, indent=1))


if __name__ == "__main__":
    main()
