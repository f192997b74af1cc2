"""What stands in for a reader's own model, files and node where a command cannot run as it is written."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet

MODEL = "examples/extract/model"
REPLACED = (
    (r"path/to/[\w.-]*\w", MODEL),
    (r"seesaw run …", f"seesaw run --model {MODEL} --input prompts.jsonl --output until.jsonl"),
    (r"--model …", f"--model {MODEL}"),
    (r"--metrics-port \d+", "--metrics-port {port}"),
    (r"\bmake test(?=\s|$)", "PYTEST_ADDOPTS=tests/core make test"),
    (r"\bmake test-all(?=\s|$)", "PYTEST_ADDOPTS=tests/core make test-all"),
)
"""Patterns in commands, and what they become; the suite itself is cut to a part of it."""


def runnable(text: str, port: int = 9100) -> str:
    for pattern, replacement in REPLACED:
        text = re.sub(pattern, replacement.format(port=port), text)
    return text


def write_files(folder: Path) -> None:
    """The files that the docs name: prompts in every format, and a node."""
    prompts = [f"Order {number}: three hammers and a saw to Porto by May." for number in range(6)]
    rows = [{"prompt": prompt, "max_tokens": 8} for prompt in prompts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)
    for name in ("extra.jsonl.gz", "dump.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(lines.encode()))
    (folder / "reviews.csv").write_text(
        "text,max_tokens\n" + "".join(f'"{prompt}",8\n' for prompt in prompts)
    )
    for number in (1, 2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"part-{number}.parquet")
    (folder / "node.json").write_text(json.dumps({"ranks": [{"cores": [0]}, {"cores": [0]}]}))
