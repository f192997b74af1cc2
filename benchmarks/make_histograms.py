"""Make the histograms that the planner's named workloads draw from, out of a folder of traces.

    python benchmarks/make_histograms.py TRACES    # rewrites src/seesaw/planning/data/*.json

A trace is a CSV file with the columns `ContextTokens` and `GeneratedTokens`, a row for each request. A histogram
counts requests by prompt and output length together. Its bins hold one length each where lengths are short, and
grow in proportion where they are long: 12 or 24 of them lead from a length to its double. Prints, for each trace
and for 20,000 samples of it, the mean and the 50th, 90th and 99th percentile, and the size of the file.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import seesaw.planning
from seesaw.planning.workloads import workload

Ints = NDArray[np.int64]
DATA = Path(seesaw.planning.__file__).parent / "data"
CHANGES = "Only the numbers of prompt and output tokens are kept, counted in bins; no text, no times."


@dataclass(frozen=True)
class Source:
    """Where a trace comes from."""

    file: str
    origin: str
    licence: str
    cite: str
    per_doubling: int = 24
    """Bins from one length to twice that length."""


AZURE = "https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023"
SPLITWISE = "Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024"
NANOFLOW = "https://github.com/efeslab/Nanoflow"
SOURCES = {
    "sharegpt": Source(
        "sharegpt_nanoflow.csv",
        f"{NANOFLOW}, trace of ShareGPT conversations",
        "Apache-2.0",
        "Zhu et al., NanoFlow: Towards Optimal Large Language Model Serving Throughput, OSDI 2025",
        per_doubling=12,
    ),
    "arxiv": Source(
        "arxiv_summarization_llama2_le4k.csv",
        "https://github.com/microsoft/vidur, processed trace of arXiv summarisation "
        "(Llama-2 tokeniser, at most 4,096 tokens in all)",
        "MIT",
        "Agrawal et al., Vidur: A Large-Scale Simulation Framework For LLM Inference, MLSys 2024; data set: "
        "Cohan et al., A Discourse-Aware Attention Model for Abstractive Summarization of Long Documents, NAACL 2018",
    ),
    "azure-code": Source("azure2023_code.csv", f"{AZURE}, code", "CC-BY-4.0", SPLITWISE),
    "azure-conv": Source("azure2023_conv.csv", f"{AZURE}, conversation", "CC-BY-4.0", SPLITWISE),
    "lmsys": Source(
        "lmsys_nanoflow.csv",
        f"{NANOFLOW}, trace of LMSYS-Chat-1M",
        "Apache-2.0",
        "Zheng et al., LMSYS-Chat-1M: A Large-Scale Real-World LLM Conversation Dataset, ICLR 2024",
        per_doubling=12,
    ),
    "mooncake": Source(
        "mooncake_conversation.csv",
        "https://github.com/kvcache-ai/Mooncake, conversation trace",
        "Apache-2.0",
        "Qin et al., Mooncake: Trading More Storage for Less Computation, FAST 2025",
    ),
}


def read_lengths(path: Path) -> tuple[Ints, Ints]:
    """Prompt and output tokens of each request of a trace."""
    with path.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    lengths = np.array(rows, dtype=np.int64)
    return lengths[:, 0], lengths[:, 1]


def bin_edges(values: Ints, per_doubling: int) -> Ints:
    """From the least value to one beyond the greatest; bin i holds `edges[i] <= x < edges[i + 1]`."""
    least, end = int(values.min()), int(values.max()) + 1
    steps = np.arange(1, int(per_doubling * np.log2(end / least)) + 1)
    inner = np.round(least * 2.0 ** (steps / per_doubling)).astype(np.int64)
    return np.unique(np.concatenate([[least, end], inner[inner < end]]))


def cells(prompt: Ints, output: Ints, prompt_edges: Ints, output_edges: Ints) -> list[list[int]]:
    """For each prompt bin, the output bins that are not empty, each followed by its count."""
    rows = np.searchsorted(prompt_edges, prompt, side="right") - 1
    columns = np.searchsorted(output_edges, output, side="right") - 1
    counts = np.zeros((len(prompt_edges) - 1, len(output_edges) - 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return [[int(n) for i in np.flatnonzero(row) for n in (i, row[i])] for row in counts]


def write_histogram(path: Path, name: str, source: Source, prompt: Ints, output: Ints) -> None:
    """One JSON object; a line for each prompt bin."""
    edges = bin_edges(prompt, source.per_doubling), bin_edges(output, source.per_doubling)
    head = {
        "name": name,
        "origin": source.origin,
        "licence": source.licence,
        "cite": source.cite,
        "changes": CHANGES,
        "requests": len(prompt),
        "mean_prompt": round(float(prompt.mean()), 2),
        "mean_output": round(float(output.mean()), 2),
        "longest": int((prompt + output).max()),
        "prompt_edges": edges[0].tolist(),
        "output_edges": edges[1].tolist(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in cells(prompt, output, *edges))
    path.write_text("{\n" + ",\n".join(lines) + ',\n"cells": [\n' + rows + "\n]\n}\n", encoding="utf-8")


def report(name: str, prompt: Ints, output: Ints) -> None:
    """Trace and samples side by side."""
    drawn = workload(name, 20_000)
    for what, trace, sample in (("in ", prompt, drawn.prompt), ("out", output, drawn.output)):
        figures = [
            f"{a.mean():9.2f} " + " ".join(f"{x:8.1f}" for x in np.percentile(a, [50, 90, 99]))
            for a in (trace, sample)
        ]
        print(f"{name:10} {what} {len(trace):7} rows: {figures[0]}   samples: {figures[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, help="folder with the CSV files")
    arguments = parser.parse_args()
    for name, source in SOURCES.items():
        prompt, output = read_lengths(arguments.traces / source.file)
        path = DATA / f"{name}.json"
        write_histogram(path, name, source, prompt, output)
        report(name, prompt, output)
        print(f"{name:10} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
