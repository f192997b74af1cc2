"""Kill a job in the middle, run the same command again, and check that nothing was lost and nothing done twice.

    .venv/bin/python examples/cookbook/resume_job.py

`seesaw run` writes answers to OUTPUT.part as they come and notes in OUTPUT.journal, within a second, which rows are
safe. SIGKILL leaves it no moment to tidy up, and the same command goes on: there is no option for it. Rows of the
last second may run again. OUTPUT appears when every row has its line (docs/jobs.md).

To change: nothing. Take `command` for your model and files; and on a machine that may be taken away, in a shell,
`until seesaw run …; [ $? -ne 3 ]; do sleep 60; done`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

EXTRACT = Path(__file__).parents[1] / "extract"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a killed job may leave half of one at the end."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def kill_midway(command: list[str], part: Path, rows: int) -> list[dict[str, Any]]:
    """Start the command and kill it once `rows` answers are in `part`; returns those that are there."""
    job = subprocess.Popen(command)
    while not part.exists() or part.read_bytes().count(b"\n") < rows:
        if job.poll() is not None:
            raise SystemExit(f"the job ended (exit code {job.returncode}) before {rows} answers were written")
        time.sleep(0.02)
    job.kill()  # SIGKILL
    job.wait()
    return lines_of(part)


def main(argv: list[str] | None = None) -> int:
    """Kill, go on, compare; 0 if every row was answered once and none that was safe ran again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=EXTRACT / "model", metavar="DIR")
    parser.add_argument("--plan", default="P2->T2")
    parser.add_argument("--ranks", type=int, help="by default as many as the plan has")
    parser.add_argument("--input", type=Path, default=EXTRACT / "orders.jsonl")
    parser.add_argument("--limit", type=int, default=600, help="rows to take of the input")
    parser.add_argument("--kill-after", type=int, default=100, help="answers to wait for")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.jsonl"
        command = [sys.executable, "-m", "seesaw", "run", "--model", str(args.model)]
        command += ["--input", str(args.input), "--output", str(output), "--limit", str(args.limit)]
        command += ["--plan", args.plan, *(["--ranks", str(args.ranks)] if args.ranks else [])]
        command += ["--max-running=64"]  # answers come a few at a time: there is a middle to be killed in
        written = kill_midway(command, output.with_name(output.name + ".part"), args.kill_after)
        subprocess.run(command, check=True)
        answers = {line["custom_id"]: line for line in lines_of(output)}
        times = Counter(line["custom_id"] for line in lines_of(output))
        manifest = json.loads(output.with_name(output.name + ".manifest.json").read_text())
    asked = {row["custom_id"] for row in lines_of(args.input)[: args.limit]}
    safe = written[: manifest["sessions"][-1]["rows_before"]]
    # An answer bears an id of its own and the time it was made, so one that was made again is another line.
    again = sum(answers.get(line["custom_id"]) != line for line in safe)
    once = times.keys() == asked and set(times.values()) == {1}
    print(f"killed with {len(written)} answers written, of which {len(safe)} were safe")
    print(f"{len(asked)} rows asked, {len(answers)} answered, each once: {'yes' if once else 'NO'}")
    print(f"safe rows that ran again: {again}")
    return 0 if once and not again else 1


if __name__ == "__main__":
    raise SystemExit(main())
