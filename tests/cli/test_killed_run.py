"""`seesaw run` as a process that is killed at random moments, each time followed by the same command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from seesaw.jobs.journal import replay
from seesaw.text import Tokenizer
from tests.checkpoints import clear_prompts, make_checkpoint
from tests.jobs.contract import read
from tests.test_text import save

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
DISTINCT = 24
"""Prompts, which repeat: all free of near ties, so that no batch changes an answer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=420, eos_token_id=2)
    save(path, "byte-level")
    return path


def write_rows(path: Path, model: Path, count: int) -> list[str]:
    """A job; every 50th row fails. Returns the text that each row must be answered with, if it is."""
    tokenizer = Tokenizer.load(model)
    prompts, expected = clear_prompts(model, [3 + 5 * (i % 7) for i in range(DISTINCT)], 12)
    rows = [
        {
            "id": f"row-{i}",
            "prompt_token_ids": prompts[i % DISTINCT],
            **GREEDY,
            **({"top_p": 7} if i % 50 == 0 else {}),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tokenizer.decode(expected[i % DISTINCT]) for i in range(count)]


def command(model: Path, source: Path) -> list[str]:
    memory = [
        "--device-memory",
        "16MiB",
        "--host-kv",
        "1MiB",
        "--max-model-len",
        "100",
        "--max-running",
        "16",
    ]
    files = ["--model", str(model), "--input", str(source), "--output", str(source.with_name("out.jsonl"))]
    plan = ["--plan", "P2->T2", "--dtype", "float32"]
    return [sys.executable, "-m", "seesaw", "run", *files, *memory, *plan]


def safe_rows(journal: Path) -> dict[int, tuple[int, ...]]:
    """The records of all rows that are safe, by row; none has two."""
    if not journal.exists() or journal.stat().st_size < 40:
        return {}
    rows = replay(journal).rows()
    found = {int(row["a"]): tuple(int(row[name]) for name in ("kind", "b", "c", "d", "e")) for row in rows}
    assert len(found) == len(rows), "a row ran again that was safe"
    return found


AT_THE_END = 1 << 40


def kill_at(line: list[str], source: Path, dice: random.Random, rows: int) -> int:
    """Start the command and kill it a moment after `rows` more rows were safe, or as it gives names to files."""
    journal = source.with_name("out.jsonl.journal")
    wanted = (journal.stat().st_size if journal.exists() else 0) + 40 * rows
    job = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    manifest = source.with_name("out.jsonl.manifest.json")
    while job.poll() is None:
        if journal.exists() and journal.stat().st_size >= wanted:
            break
        if manifest.exists() and b'"finishing"' in manifest.read_bytes():
            break
        time.sleep(0.002)
    time.sleep(dice.random() * dice.choice([0, 0.01, 0.5]) * (rows < AT_THE_END))
    job.kill()
    _, said = job.communicate()
    assert job.returncode in (-9, 1), said
    return job.returncode


def killed(model: Path, folder: Path, *, count: int, kills: int, rows: int) -> int:
    """Kill a job after some `rows` at a time until it is complete or has been killed often enough; then let it end.

    Returns how often it was killed.
    """
    source = folder / "in.jsonl"
    expected = write_rows(source, model, count)
    journal, dice = folder / "out.jsonl.journal", random.Random(kills)
    line, left = command(model, source), kills
    before: dict[int, tuple[int, ...]] = {}
    while left:
        if kill_at(line, source, dice, dice.choice([1, rows // 2, rows, 2 * rows])) == 1:
            break
        left -= 1
        after = safe_rows(journal)
        assert before.items() <= after.items()
        before = after
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert before.items() <= safe_rows(journal).items()
    answers, failures = read(folder / "out.jsonl"), read(folder / "out.errors.jsonl")
    assert sorted(x["custom_id"] for x in answers + failures) == sorted(f"row-{i}" for i in range(count))
    for answer in answers:
        choice = answer["response"]["body"]["choices"][0]
        number = int(answer["custom_id"].removeprefix("row-"))
        assert choice["text"] == expected[number]
    return kills - left


def test_a_job_that_is_killed(model: Path, tmp_path: Path) -> None:
    killed(model, tmp_path, count=120, kills=3, rows=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_that_is_killed_a_hundred_times(model: Path, tmp_path: Path) -> None:
    """Jobs of 2,000 rows, killed on their way, one after the other; and small ones, each killed as it ends."""
    left = 90
    while left:
        folder = tmp_path / f"large-{left}"
        folder.mkdir()
        left -= killed(model, folder, count=2000, kills=left, rows=8)
    for number in range(10):
        folder = tmp_path / f"small-{number}"
        folder.mkdir()
        killed(model, folder, count=10, kills=1, rows=AT_THE_END)
