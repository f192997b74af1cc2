"""`python -m benchmarks.rig`: set a rig up, run a command on it, measure it."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
