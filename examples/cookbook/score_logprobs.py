"""Choose among labels by log-probability: one token per row, and how sure the model is of it.

    .venv/bin/python examples/cookbook/score_logprobs.py

The answer is begun for the model up to where the label stands (`ANSWER`), and one token is asked for, with the 20
most likely ones. A label's probability is that of the token it begins with, so labels must begin differently. What
the labels together lack to 1 went to tokens that are no label. Rows below `--sure` are for a person to look at.

To change: `ANSWER`, such as "The sentiment is"; the labels; `--sure`, by what a mistake costs you.
"""

from __future__ import annotations

import argparse
import json
from math import exp
from pathlib import Path

from seesaw import LLM, RequestOutput, SamplingParams

HERE = Path(__file__).parent
# The example's model names the city after a customer and items. Any will do; without a name it is less sure.
ANSWER = '{"name":"","items":[{"product":"shovels","quantity":3}],"city":"'
TOP = 20


def choose(output: RequestOutput, labels: list[str]) -> tuple[str, float]:
    """The most likely label and its probability. One that is not among the top tokens counts as 0."""
    assert output.outputs[0].logprobs is not None
    tokens = {t.text: exp(t.logprob) for t in output.outputs[0].logprobs[0].values() if t.text}
    scores = {
        label: max((p for text, p in tokens.items() if label.startswith(text)), default=0.0)
        for label in labels
    }
    return max(scores.items(), key=lambda item: item[1])


def main(argv: list[str] | None = None) -> None:
    """Choose a city for each order, and compare with the right ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=HERE.parent / "extract" / "model", metavar="DIR")
    parser.add_argument("--plan", default="P2->T2")
    parser.add_argument("--ranks", type=int, help="by default as many as the plan has")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "orders.jsonl")
    parser.add_argument("--sure", type=float, default=0.95, help="least probability to go unchecked")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.data.open(encoding="utf-8")]
    labels = sorted({row["fields"]["city"] for row in rows})
    chats = [
        [{"role": "user", "content": row["message"]}, {"role": "assistant", "content": ANSWER}]
        for row in rows
    ]
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP)
    with LLM(args.model, plan=args.plan, ranks=args.ranks) as llm:
        # The chat template leaves the last message open, for the model to go on with.
        outputs = llm.chat(chats, one, add_generation_prompt=False, continue_final_message=True)
        scored = [(*choose(output, labels), row) for output, row in zip(outputs, rows, strict=True)]
    hits = [label == row["fields"]["city"] for label, _, row in scored]
    sure = [hit for hit, (_, probability, _) in zip(hits, scored, strict=True) if probability >= args.sure]
    print(f"{sum(hits)} of {len(hits)} right ({sum(hits) / len(hits):.1%}), among {len(labels)} labels")
    print(f"{len(sure)} at least {args.sure:.0%} sure, {sum(sure)} of them right; the least sure:")
    for label, probability, row in sorted(scored, key=lambda item: item[1])[:3]:
        print(f"  {probability:6.1%} {label:10} {row['message']}")


if __name__ == "__main__":
    main()
