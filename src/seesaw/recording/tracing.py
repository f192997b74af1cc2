"""`EngineTrace`: what the control process tells of itself in a trace: phases, scheduling, counters."""

from __future__ import annotations

import time
from collections.abc import Callable

from seesaw.core.actions import Action, Forward, SwapIn, SwapOut
from seesaw.core.events import CONTROL, PHASES, SCHEDULER, Event
from seesaw.core.stats import EngineStats
from seesaw.recording.trace import TraceWriter

_SECONDS = 0.05
"""Between two readings of the counters."""


class EngineTrace:
    """Writes the control process's rows of a trace. Its methods are called by the thread of the engine's loop."""

    def __init__(self, writer: TraceWriter) -> None:
        self.stats: Callable[[], EngineStats] | None = None
        """Where the counters are read; set by the engine."""
        self._writer = writer
        self._due = 0.0
        self._last: tuple[float, int, int] = (time.monotonic(), 0, 0)
        """Time, prompt tokens and output tokens of the last reading."""
        self._names: dict[str, int] = {}
        """Actions of the present round, by kind."""
        self._tokens = 0

    def submitted(self, action: Action) -> None:
        """An action of the round under way."""
        match action:
            case Forward():
                name = "Forwards"
                self._tokens += len(action.tokens)
            case SwapIn():
                name = "swap-ins"
            case SwapOut():
                name = "swap-outs"
            case _:
                name = "transitions"
        self._names[name] = self._names.get(name, 0) + 1

    def scheduled(self, start: float, end: float) -> None:
        """From the start of a round until the control process began to wait."""
        args: dict[str, int | float | str] = dict(self._names)
        event = Event("schedule", CONTROL, SCHEDULER, start, end - start, tokens=self._tokens, args=args)
        self._names.clear()
        self._tokens = 0
        self._writer.add([event])

    def completed(self, start: float, end: float, completions: int) -> None:
        """From the end of the wait until the completions were taken in."""
        args: dict[str, int | float | str] = {"completions": completions}
        self._writer.add([Event("completions", CONTROL, SCHEDULER, start, end - start, args=args)])
        if end >= self._due:
            self._due = end + _SECONDS
            self._count(end)

    def phase(self, name: str, start: float, end: float) -> None:
        """A phase has ended."""
        self._writer.add([Event(name, CONTROL, PHASES, start, end - start)])

    def _count(self, now: float) -> None:
        if self.stats is None:
            return
        stats = self.stats()
        before, prompt, output = self._last
        seconds = max(now - before, 1e-9)
        fed, sampled = stats.prompt_tokens_fed, stats.tokens_sampled
        self._last = now, fed, sampled
        self._writer.counters(
            {
                "host buffer (MiB)": stats.host_kv_used_bytes / 2**20,
                "device KV (MiB)": stats.device_kv_used_bytes / 2**20,
                "running sequences": stats.requests_running,
                "prompt tokens/s": (fed - prompt) / seconds,
                "output tokens/s": (sampled - output) / seconds,
            }
        )
