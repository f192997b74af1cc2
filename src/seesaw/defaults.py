"""Sampling settings that a model's authors recommend: those of its `generation_config.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seesaw.core.errors import ConfigError, ModelError, RequestError
from seesaw.core.sampling import SamplingParams

logger = logging.getLogger(__name__)

_TAKEN = {
    **{name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}
"""Settings by their name in the file."""
NEUTRAL = "vllm"
"""vLLM's word for no recommendations."""


def default_sampling(
    model: Path, source: str = "auto", changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of `SamplingParams` where a request leaves them open, as vLLM chooses them.

    `source` is `auto` for the model's own file, `vllm` for none, or a folder with the file. `changes` (vLLM's
    `override_generation_config`) go over what it says. Raises `ModelError` for a file that cannot be read or used,
    `ConfigError` where a folder that is named has none.
    """
    path = Path(model if source == "auto" else source) / "generation_config.json"
    found: dict[str, Any] = {}
    if source != NEUTRAL:
        if path.is_file():
            found = _read(path)
        elif source != "auto":
            raise ConfigError(
                f"generation_config={source!r}: there is no {path}; choose auto, vllm or a folder with it"
            )
    found |= dict(changes or {})
    chosen = {ours: found[theirs] for theirs, ours in _TAKEN.items() if found.get(theirs) is not None}
    if not chosen:
        return {}
    try:
        SamplingParams(**chosen)
    except RequestError as error:
        raise ModelError(f"{path}: {error}; generation_config='vllm' leaves it aside") from error
    logger.info(
        "what requests leave open: %s",
        ", ".join(f"{name} {value}" for name, value in chosen.items()),
    )
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected an object")
    return content
