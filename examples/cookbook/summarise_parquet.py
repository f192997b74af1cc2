"""Summarise a text column of a Parquet file: a chat per row, the answer as a new column, all else as it was.

    .venv/bin/python examples/cookbook/summarise_parquet.py

The file is read and written a group of rows at a time, so it may be larger than memory. The example's model makes
JSON of an order, which here counts as its summary.

To change: `PROMPT`, which is what your model is told about each text; `--model`, `--plan`, the files and the column.
A job of hours belongs into `seesaw run`, which goes on where it was stopped: give it a Parquet file with a column
`messages` (docs/files.md).
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from seesaw import LLM, SamplingParams

HERE = Path(__file__).parent
PROMPT = "{text}"  # such as "Summarise this review in one sentence:\n\n{text}"
GROUP = 1024


def summarise(llm: LLM, source: Path, target: Path, column: str, max_tokens: int) -> tuple[int, int]:
    """Write the rows of `source` with a column `summary` to `target`; returns rows and those without a summary."""
    file, prompts = pq.ParquetFile(source), pq.ParquetFile(source)
    chats = (
        [{"role": "user", "content": PROMPT.format(text=text or "")}]
        for group in prompts.iter_batches(GROUP, columns=[column])
        for text in group[column].to_pylist()
    )
    # An iterator of chats gives an iterator of answers, in the same order; the engine reads ahead of it.
    outputs = iter(llm.chat(chats, SamplingParams(temperature=0, max_tokens=max_tokens)))
    rows = failed = 0
    with pq.ParquetWriter(target, file.schema_arrow.append(pa.field("summary", pa.string()))) as writer:
        for group in file.iter_batches(GROUP):
            # A row that cannot be served, say because it is too long, has `error` set and no outputs.
            summaries = [o.outputs[0].text if o.error is None else None for o in islice(outputs, len(group))]
            writer.write_batch(group.append_column("summary", pa.array(summaries, pa.string())))
            rows, failed = rows + len(summaries), failed + summaries.count(None)
    return rows, failed


def main(argv: list[str] | None = None) -> None:
    """Summarise, and show the first row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=HERE.parent / "extract" / "model", metavar="DIR")
    parser.add_argument("--plan", default="P2->T2")
    parser.add_argument("--ranks", type=int, help="by default as many as the plan has")
    parser.add_argument("--input", type=Path, default=HERE / "data" / "orders.parquet")
    parser.add_argument("--column", default="message")
    parser.add_argument("--output", type=Path, default=Path("out/orders.summarised.parquet"))
    parser.add_argument("--max-tokens", type=int, default=160)
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with LLM(args.model, plan=args.plan, ranks=args.ranks) as llm:
        rows, failed = summarise(llm, args.input, args.output, args.column, args.max_tokens)
    first = pq.read_table(args.output).slice(0, 1).to_pylist()[0]
    print(f"{args.output}: {rows} rows, {failed} without a summary")
    print(f"  {args.column:8} {first[args.column]}\n  summary  {first['summary']}")


if __name__ == "__main__":
    main()
