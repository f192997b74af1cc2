"""Seesaw: offline, batch LLM inference that re-shards the model between prefill and decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seesaw.core.errors import SeesawError
from seesaw.core.request import CompletionOutput, Request, RequestOutput
from seesaw.core.sampling import SamplingParams

if TYPE_CHECKING:
    from seesaw.llm import LLM

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SeesawError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """`LLM` is imported when it is first asked for: it brings torch, which takes a second or two."""
    if name == "LLM":
        from seesaw.llm import LLM

        return LLM
    raise AttributeError(f"module 'seesaw' has no attribute {name!r}")
