"""Evaluate a checkpoint on labelled JSON lines: greedy answers, exact match by field, and what is taken for what.

    .venv/bin/python examples/cookbook/evaluate.py

Two prompts are compared here: the bare message, as the example's model was trained, and one with an instruction it
has never seen. To compare checkpoints instead, run the script once for each with `--model`.

To change: `PROMPTS`, and `fields_of` where answers are not JSON. Each line of the data has `message` and the right
`fields`. Greedy answers do not depend on the plan in float32; in bfloat16 a near tie may fall either way.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from seesaw import LLM, SamplingParams

HERE = Path(__file__).parent
PROMPTS = {"bare": "{message}", "instructed": "Give the fields of this order as JSON: {message}"}


def fields_of(text: str) -> dict[str, Any]:
    """The fields that an answer states; none if it is no JSON object."""
    with suppress(json.JSONDecodeError):
        fields = json.loads(text)
        return fields if isinstance(fields, dict) else {}
    return {}


def leaves(name: str, value: Any) -> dict[str, Any]:
    """A field taken apart: `{"items.0.quantity": 3, …}`, so that a confusion names the very value that is wrong."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in parts for k, v in leaves(f"{name}.{key}", part).items()}


def report(title: str, answers: list[dict[str, Any]], labels: list[dict[str, Any]]) -> None:
    """Print the accuracy, in all and by field, and the commonest confusions."""
    pairs = list(zip(answers, labels, strict=True))
    right = sum(answer == label for answer, label in pairs)
    print(f"{title}: {right} of {len(pairs)} exactly right ({right / len(pairs):.1%})")
    for name in labels[0]:
        hits = sum(answer.get(name) == label[name] for answer, label in pairs)
        print(f"  {name:8} {hits / len(pairs):7.1%}")
    confused: Counter[tuple[str, Any, Any]] = Counter()
    for answer, label in pairs:
        given = leaves("", answer)
        wrong = {k: v for k, v in leaves("", label).items() if given.get(k) != v}
        confused.update((name.strip("."), value, given.get(name)) for name, value in wrong.items())
    for (name, value, got), count in confused.most_common(5):
        print(f"    {count} x {name}: {value!r} read as {got!r}")


def main(argv: list[str] | None = None) -> None:
    """Ask under each prompt and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=HERE.parent / "extract" / "model", metavar="DIR")
    parser.add_argument("--plan", default="P2->T2")
    parser.add_argument("--ranks", type=int, help="by default as many as the plan has")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "orders.jsonl")
    parser.add_argument("--max-tokens", type=int, default=160)
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.data.open(encoding="utf-8")]
    greedy = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    with LLM(args.model, plan=args.plan, ranks=args.ranks) as llm:
        for title, prompt in PROMPTS.items():
            chats = [[{"role": "user", "content": prompt.format(message=row["message"])}] for row in rows]
            answers = [fields_of(output.outputs[0].text) for output in llm.chat(chats, greedy)]
            report(title, answers, [row["fields"] for row in rows])


if __name__ == "__main__":
    main()
