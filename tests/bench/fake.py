"""A contestant without an engine. Run by path: `fake.py NAME LOG [FAILURE]`.

Each run appends its name to LOG and takes as many seconds as it has requests, by its own account. With a FAILURE
`open`, `run`, `die` or `mute`, it fails to open, fails its second run (the first counted one), dies in it, or never
answers it. It has a child that runs in circles, as engines have workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from seesaw.bench.contestants.service import Measured, serve

NAME, LOG, FAILURE = sys.argv[1], sys.argv[2], (sys.argv[3:] or [""])[0]


class Fake:
    """See `service.ServedEngine`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        if FAILURE == "open":
            raise RuntimeError("no such engine")
        print("engines print things")
        self._child = subprocess.Popen([sys.executable, "-ISc", "import time\nwhile True: time.sleep(0.001)"])
        self.about = {"name": NAME, "options": options, "child": self._child.pid}
        self._runs = 0

    def run(self, prompts: list[list[int]], outputs: list[int]) -> Measured:
        self._runs += 1
        if self._runs == 2:
            self._fail()
        with open(LOG, "a") as log:
            log.write(f"{NAME} {len(prompts)} {prompts[0][0]}\n")
        phases = {"prefill": 0.25 * len(prompts), "decode": 0.75 * len(prompts)}
        return Measured(float(len(prompts)), outputs, {"seconds_per_phase": phases})

    def _fail(self) -> None:
        if FAILURE == "run":
            raise RuntimeError("out of luck")
        if FAILURE == "die":
            print("alas", file=sys.stderr, flush=True)
            os._exit(7)
        if FAILURE == "mute":
            time.sleep(1000)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()


if __name__ == "__main__":
    sys.exit(serve(Fake))
