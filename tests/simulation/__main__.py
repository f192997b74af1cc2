"""Run the job of a seed again, with what happened: `python -m tests.simulation SEED SIZE`."""

from __future__ import annotations

import sys

from tests.simulation.job import run
from tests.simulation.violations import Violation


def main() -> int:
    """Print actions, completions and faults; at the end what was violated."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    seed, size = int(sys.argv[1]), int(sys.argv[2])
    log: list[str] = []
    try:
        watch = run(seed, size, log=log)
    except Violation as violation:
        print("\n".join(log))
        print(f"seed {seed}, size {size}: {violation}")
        return 1
    print("\n".join(log))
    print(f"seed {seed}, size {size}: {watch.tally}")
    return 0


sys.exit(main())
