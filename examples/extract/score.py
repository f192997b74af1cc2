"""Compare the answers of a finished job with the expected ones.

    python examples/extract/score.py out/orders.jsonl examples/extract/orders.expected.jsonl --minimum 0.98

Exits with 1 if a row is missing, answered twice or not asked for, or if fewer answers than the minimum are
exactly right. A row that ended in an error counts as answered, but wrongly.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; blank lines are skipped."""
    # Not str.splitlines(), which also breaks at characters such as U+2028 that JSON strings may hold.
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def content(row: dict[str, Any]) -> str | None:
    """The text of an OpenAI Batch output row, or None where the row carries an error instead of an answer."""
    response = row.get("response")
    if row.get("error") or not response or response.get("status_code") != 200:
        return None
    text: str | None = response["body"]["choices"][0]["message"]["content"]
    return text


def report(rows: list[dict[str, Any]], expected: dict[str, str], minimum: float) -> bool:
    """Print the score of the rows; whether it is good enough."""
    times = Counter(row["custom_id"] for row in rows)
    once = sum(times[name] == 1 for name in expected)
    twice = sum(times[name] > 1 for name in expected)
    missing = sum(name not in times for name in expected)
    unknown = sum(name not in expected for name in times)
    failed = sum(content(row) is None for row in rows)
    right = sum(
        content(row) == expected.get(row["custom_id"], "") for row in rows if times[row["custom_id"]] == 1
    )
    share = right / len(expected)
    print(f"rows expected   {len(expected)}")
    print(f"answered once   {once}")
    print(f"duplicated      {twice}")
    print(f"missing         {missing}")
    print(f"not asked for   {unknown}")
    print(f"with an error   {failed}")
    print(f"exactly right   {right} of {len(expected)} ({share:.2%}; at least {minimum:.2%} wanted)")
    return not (twice or missing or unknown) and share >= minimum


def main() -> int:
    """Read both files and print the score; 0 if it is good enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--minimum", type=float, default=0.98, help="least share of exactly right answers")
    args = parser.parse_args()
    expected = {row["custom_id"]: row["answer"] for row in read_rows(args.expected)}
    if not expected:
        parser.error(f"{args.expected} holds no rows")
    return 0 if report(read_rows(args.output), expected, args.minimum) else 1


if __name__ == "__main__":
    raise SystemExit(main())
