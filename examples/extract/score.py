"""Compare the answers of a finished job with the expected ones.

    python examples/extract/score.py out/orders.jsonl examples/extract/orders.expected.jsonl --minimum 0.98

Exits with 1 if a row is missing or answered twice, or if fewer answers than the minimum are exactly right.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path


def answers(path: Path) -> list[tuple[str, str]]:
    """(custom_id, content) of every line of an OpenAI Batch output file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append((row["custom_id"], row["response"]["body"]["choices"][0]["message"]["content"]))
    return found


def main() -> int:
    """Print the score; 0 if it is good enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--minimum", type=float, default=0.98, help="least share of exactly right answers")
    args = parser.parse_args()
    expected = {}
    for line in args.expected.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        expected[row["custom_id"]] = row["answer"]
    found = answers(args.output)
    times = Counter(custom_id for custom_id, _ in found)
    once = sum(times[custom_id] == 1 for custom_id in expected)
    right = sum(expected.get(custom_id) == answer for custom_id, answer in found if times[custom_id] == 1)
    share = right / len(expected)
    print(f"answered once  {once} of {len(expected)} rows")
    print(f"exactly right  {right} of {len(expected)} ({share:.2%}; at least {args.minimum:.0%} wanted)")
    return 0 if once == len(expected) == len(found) and share >= args.minimum else 1


if __name__ == "__main__":
    raise SystemExit(main())
