"""`Event`: something that happened on a rank or in the control process and took a while; what traces are made of."""

from __future__ import annotations

import msgspec

COMPUTE, COPIES = "compute", "copies"
"""Lanes of a rank: its main thread, and the thread that copies KV beside it."""
SCHEDULER, PHASES = "scheduler", "phases"
"""Lanes of the control process: what it does between actions and completions, and what the ranks are doing."""

CONTROL = -1
"""Stands for the control process where a rank is named."""


class Event(msgspec.Struct, array_like=True, frozen=True):
    """A span of time. Spans of one lane follow each other or lie within each other."""

    name: str
    rank: int
    """Or `CONTROL`."""
    lane: str
    start: float
    """Seconds of the monotonic clock, which all processes of a machine share."""
    seconds: float
    tokens: int = 0
    bytes: int = 0
    args: dict[str, int | float | str] = {}
