"""Make synthetic data: eight samples of each prompt (`n=8`), the broken and the double ones dropped, JSON lines out.

    .venv/bin/python examples/cookbook/synthesise.py

Each prompt is an order without customer and date, which the example's model then has to invent.

A seed per prompt fixes the noise of its samples, each of which has its own, whatever the plan and the other prompts.
What `n` costs: each sample is a sequence of its own, whose prompt is computed and whose KV is kept for it alone. So
`n=8` saves rows and tokenising but no prefill; the last line that is printed counts it.

To change: `PROMPT`, `valid` (what may pass: most of the quality of a data set is decided here), the temperature.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from seesaw import LLM, SamplingParams

MODEL = Path(__file__).parents[1] / "extract" / "model"
PRODUCTS = ("copper wire", "steel bolts", "fire blankets", "desk lamps", "garden hoses")
CITIES = ("Lyon", "Porto", "Graz", "Bergen")
PROMPT = "We need {quantity} {product} in {city}. Contact:"
ASKED = [  # what an answer must hold
    {"items": [{"product": name, "quantity": count}], "city": city}
    for count, (name, city) in enumerate(product(PRODUCTS, CITIES), 12)
]


def valid(text: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The order of an answer, or None unless it is whole, says what was asked, and has a name and a real date."""
    try:
        order = json.loads(text)
        date.fromisoformat(order["date"])
        named = re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", order["name"])
    except (ValueError, TypeError, KeyError):
        return None
    return order if named and order | asked == order else None


def main(argv: list[str] | None = None) -> None:
    """Sample, sift, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, metavar="DIR")
    parser.add_argument("--plan", default="P2->T2")
    parser.add_argument("--ranks", type=int, help="by default as many as the plan has")
    parser.add_argument("--output", type=Path, default=Path("out/synthetic.jsonl"))
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--temperature", type=float, default=1.2)
    args = parser.parse_args(argv)
    prompts = [PROMPT.format(**asked["items"][0], city=asked["city"]) for asked in ASKED]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    shared = {"n": args.samples, "temperature": args.temperature, "max_tokens": 160}
    with LLM(args.model, plan=args.plan, ranks=args.ranks) as llm:
        outputs = list(llm.chat(chats, [SamplingParams(seed=seed, **shared) for seed in range(len(chats))]))
        computed = llm.stats().prompt_tokens_fed
    kept, broken = dict[str, dict[str, Any]](), 0
    for seed, output in enumerate(outputs):
        for sample in output.outputs:
            order = valid(sample.text, ASKED[seed])
            broken += order is None
            if order is not None:
                made = {"prompt": prompts[seed], "seed": seed, "sample": sample.index, "order": order}
                kept.setdefault(json.dumps(order, sort_keys=True), made)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(made) + "\n" for made in kept.values()), encoding="utf-8")
    samples, said = len(chats) * args.samples, sum(len(output.prompt_token_ids) for output in outputs)
    print(f"{args.output}: {len(kept)} orders of {samples} samples")
    print(f"  {broken} broken or not as asked, {samples - broken - len(kept)} there before")
    print(f"  {said} prompt tokens, computed {computed / said:.1f} times: n={args.samples}")


if __name__ == "__main__":
    main()
