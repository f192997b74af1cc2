"""Write the data of the cookbook: 300 held-out orders, as labelled JSON lines and as a Parquet table.

    python examples/cookbook/data/make.py

Seeded, so the files come out the same. The messages are of the same kind as those that `examples/extract/model`
was trained on, with names it has not seen.
"""

from __future__ import annotations

import json
import random
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2] / "extract"))
from orders import make_orders

HERE = Path(__file__).parent
ROWS, SEED = 300, 30_000


def main() -> None:
    """Write both files beside this one."""
    orders = make_orders(ROWS, seed=SEED, held_out_names=True)
    with (HERE / "orders.jsonl").open("w", encoding="utf-8") as lines:
        for number, order in enumerate(orders, 1):
            row = {"id": f"order-{number:03d}", "message": order.message, "fields": json.loads(order.answer)}
            lines.write(json.dumps(row) + "\n")
    dice, start = random.Random(SEED), datetime(2026, 1, 5, 8)
    table = pa.table(
        {
            "order_id": pa.array(range(1, ROWS + 1), pa.int32()),
            "received": [start + timedelta(minutes=7 * i) for i in range(ROWS)],
            "channel": [dice.choice(("mail", "form", "phone")) for _ in orders],
            "message": [order.message for order in orders],
        }
    )
    pq.write_table(table, HERE / "orders.parquet", row_group_size=100, compression="zstd")


if __name__ == "__main__":
    main()
