"""Tokenisers that encoder processes load in tests, some of which end them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.jobs.echo_engine import ByteTokenizer

DEADLY, STALLING, BROKEN = "deadly", "stall", "broken"


class PoisonedTokenizer(ByteTokenizer):
    """Bytes, but a prompt with a certain word ends the process, or fails with an error of no kind that is known."""

    def __init__(self, name: str) -> None:
        self.main = int(name) if name else 0
        """A process that is spared: there the words are text."""

    def encode(self, text: str) -> list[int]:
        if os.getpid() != self.main and DEADLY in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.getpid() != self.main and STALLING in text:
            time.sleep(600)
        if BROKEN in text:
            raise KeyError("no such piece")
        return super().encode(text)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        self.encode(str(messages))
        return super().render_chat(messages, **kwargs)


def missing(name: str) -> ByteTokenizer:
    """A tokeniser that cannot be loaded."""
    raise FileNotFoundError(name)
