"""vLLM's `use_tqdm`: a bar of finished prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")

Bar = bool | Callable[..., Any]
"""True for tqdm's, False for none, or what makes one that is like tqdm's."""


def with_bar(outputs: Iterator[_T], total: int | None, bar: Bar) -> Iterator[_T]:
    """`outputs`, each noted on the bar as it comes."""
    if not bar:
        yield from outputs
        return
    shown = _make(bar)(total=total, desc="Processed prompts", dynamic_ncols=True)
    try:
        for output in outputs:
            shown.update(1)
            yield output
    finally:
        shown.close()


def _make(bar: Bar) -> Callable[..., Any]:
    if callable(bar):
        return bar
    from tqdm.auto import tqdm

    make: Callable[..., Any] = tqdm
    return make
