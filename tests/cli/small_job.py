"""A job for a model of random weights: rows of token ids, short enough to run many times."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine.small_node import CONFIG, rows

ROWS, LONG = 240, 24


def write_job(folder: Path) -> None:
    """`config.json` and `rows.jsonl`, in `folder`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    lines = [
        {"id": r.id, "prompt_token_ids": list(r.prompt_token_ids), "max_tokens": LONG, "temperature": 0}
        for r in rows(ROWS, LONG)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(line | {"ignore_eos": True}) + "\n" for line in lines)
    )
