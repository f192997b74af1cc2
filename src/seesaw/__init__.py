"""Seesaw: offline, batch LLM inference that re-shards the model between prefill and decode."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seesaw.core.errors import SeesawError
from seesaw.core.sampling import SamplingParams

if TYPE_CHECKING:
    from seesaw.core.request import CompletionOutput, Request, RequestOutput, TextPrompt, TokensPrompt
    from seesaw.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SeesawError",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

_LATER = {
    "LLM": "seesaw.llm",
    "CompletionOutput": "seesaw.core.request",
    "Request": "seesaw.core.request",
    "RequestOutput": "seesaw.core.request",
    "TextPrompt": "seesaw.core.request",
    "TokensPrompt": "seesaw.core.request",
}
"""Imported when they are first asked for: `LLM` brings torch, which takes a second or two, the others msgspec."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'seesaw' has no attribute {name!r}")
