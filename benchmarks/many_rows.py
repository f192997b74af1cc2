"""Where the time of a job of very many, very short rows goes, and whether its memory stays flat.

    python benchmarks/many_rows.py                                   # 20,000 rows of 8 tokens, 1 token each, on T1
    python benchmarks/many_rows.py --rows 1000000 --plan 'P2->T2'    # the job that a release must hold
    python benchmarks/many_rows.py --functions 25                    # and the functions of the control process

Such a job is the worst case for everything but the model: each row is read, checked, tokenised, scheduled, answered
and written for one step of a tiny model with random weights. Prints the time of the job, the part of it in which a
rank computed, what the control process's processor time went to, and the memory of this process while the job ran.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seesaw import LLM
from seesaw.bench.shapes import SHAPES, Shape, write_config
from seesaw.core.stats import EngineStats
from seesaw.jobs.base import JobOptions, JobProgress, JobSummary
from seesaw.jobs.runner import run_job

GRAIN = Shape(hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512)


def make_model(folder: Path, shape: Shape) -> None:
    """A config and a tokeniser whose tokens are bytes."""
    folder.mkdir()
    write_config(folder, shape)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)  # type: ignore[no-untyped-call]


def make_rows(path: Path, args: argparse.Namespace) -> None:
    """Plain rows of `args.tokens` bytes each."""
    with path.open("w") as file:
        for number in range(args.rows):
            prompt = f"{number:0{args.tokens}d}"[-args.tokens :]
            row = {"id": f"row-{number}", "prompt": prompt, "max_tokens": args.max_tokens, "ignore_eos": True}
            if not args.sampled:
                row["temperature"] = 0
            file.write(json.dumps(row) + "\n")


def resident_bytes() -> int:
    """Resident memory of this process, without what it shares with others."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * 4096


class MemoryTrace:
    """Memory of this process at each progress report."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int]] = []
        """(rows done, bytes)."""

    def __call__(self, progress: JobProgress) -> None:
        """Take a sample."""
        self.samples.append((progress.rows_answered, resident_bytes()))

    def table(self, lines: int = 8) -> str:
        """A line for each of `lines` moments."""
        step = max(1, len(self.samples) // lines)
        return "\n".join(f"  {rows:>9,} rows  {size / 2**20:7.1f} MiB" for rows, size in self.samples[::step])


def rank_seconds(folder: Path) -> dict[int, float]:
    """Seconds that each rank had a Forward in hand."""
    return {
        int(path.stem.removeprefix("rank")): sum(
            phase["seconds"] for phase in json.loads(path.read_text()).values()
        )
        for path in sorted(folder.glob("rank*.json"))
    }


def report(summary: JobSummary, stats: EngineStats, ranks: dict[int, float], cpu: float) -> None:
    """Print where the time went."""
    wall, rows = summary.elapsed_seconds, summary.rows
    rank_host = sum(stats.rank_host_seconds.values())
    model = max(ranks.values()) - rank_host
    loop, waits = sum(stats.host_seconds.values()), sum(stats.seconds_per_phase.values())
    print(f"rows {rows:,}  in {wall:.2f} s: {rows / wall:,.0f} rows/s, {wall / rows * 1e6:.1f} µs each")
    print(f"steps {sum(stats.steps.values()):,}: {dict(stats.steps)}")
    for name, seconds in (
        ("model execution (busiest rank)", model),
        ("outside model execution", wall - model),
        ("  the rank's own work besides", rank_host),
        ("control process, processor time", cpu),
        ("  its loop (schedule, messages, text)", loop),
        ("  reading, encoding, answering, writing", cpu - loop),
        ("control process waited for ranks", waits),
    ):
        print(f"{name:42} {seconds:8.2f} s  {seconds / wall:6.1%}  {seconds / rows * 1e6:8.1f} µs/row")


def profiled(run: Callable[[], JobSummary], functions: int) -> JobSummary:
    """Run under cProfile, which doubles the time of the control process, and print the dearest functions."""
    profiler = cProfile.Profile()
    summary = profiler.runcall(run)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(functions)
    pstats.Stats(profiler).sort_stats("cumtime").print_stats(functions)
    return summary


def main() -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=1, help="tokens of an answer")
    parser.add_argument("--plan", default="T1")
    parser.add_argument("--shape", default="grain", choices=["grain", *SHAPES])
    parser.add_argument("--sampled", action="store_true", help="temperature 1 instead of greedy")
    parser.add_argument("--max-running", type=int, default=None)
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--host-kv", default="256MiB")
    parser.add_argument(
        "--functions", type=int, default=0, help="show so many functions of the control process"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", {"grain": GRAIN, **SHAPES}[args.shape])
        make_rows(folder / "in.jsonl", args)
        options = {
            "device_memory": args.device_memory,
            "host_kv": args.host_kv,
            "max_running": args.max_running,
        }
        memory = MemoryTrace()
        job = JobOptions(
            input=folder / "in.jsonl", model="m", output=folder / "out.jsonl", progress_seconds=0.25
        )
        with LLM(
            folder / "model", plan=args.plan, dtype="float32", profile=name, load_format="dummy", **options
        ) as llm:
            began = time.process_time()

            def run() -> JobSummary:
                return run_job(llm, job, on_progress=memory)

            summary = profiled(run, args.functions) if args.functions else run()
            cpu = time.process_time() - began
        report(summary, summary.stats, rank_seconds(folder), cpu)
        print(f"memory of the control process\n{memory.table()}")


if __name__ == "__main__":
    main()
