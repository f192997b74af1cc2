"""Arguments that another engine knows and this one does not: refused, or without effect; never dropped in silence."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Foreign:
    """What becomes of an argument of another engine."""

    reason: str
    """Why it is refused and what to do instead, or why it has no effect."""
    refused: bool
    """Whether ignoring it would give other answers than were asked for."""
    neutral: tuple[object, ...] = ()
    """Values at which it asks for nothing, beside None, False and what is empty."""

    def asks(self, value: object) -> bool:
        """Whether `value` asks for something. 0 and 0.0 are values like others."""
        if (
            value is None
            or value is False
            or (isinstance(value, (str, list, tuple, dict, set)) and not value)
        ):
            return False
        return not any(_same(value, neutral) for neutral in self.neutral)


def refused(reason: str, *names: str, neutral: Iterable[object] = ()) -> dict[str, Foreign]:
    """Arguments that would change the answers."""
    return dict.fromkeys(names, Foreign(reason, True, tuple(neutral)))


def without_effect(reason: str, *names: str, neutral: Iterable[object] = ()) -> dict[str, Foreign]:
    """Arguments that would not."""
    return dict.fromkeys(names, Foreign(reason, False, tuple(neutral)))


def take_own(
    given: Mapping[str, Any],
    own: Iterable[str],
    foreign: Mapping[str, Foreign],
    error: Callable[[str, str], Exception],
) -> tuple[dict[str, Any], list[str]]:
    """The arguments among `given` that are in `own`, and a phrase for each of the others that has no effect.

    Raises `error(sentence, name)` for one that is refused, or that nobody knows.
    """
    mine = set(own)
    taken: dict[str, Any] = {}
    notes = []
    for name, value in given.items():
        if name in mine:
            taken[name] = value
        elif name not in foreign:
            raise error(unknown(name, [*mine, *foreign]), name)
        elif foreign[name].asks(value):
            if foreign[name].refused:
                raise error(f"{name}={shown(value)}: {foreign[name].reason}", name)
            notes.append(f"{name} ({foreign[name].reason})")
    return taken, notes


def unknown(name: str, known: Iterable[str]) -> str:
    """The sentence for a name that nobody knows."""
    close = difflib.get_close_matches(name, sorted(known), n=2)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown argument {name!r}{hint}"


def shown(value: object) -> str:
    """`value` as it goes into a message: never long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _same(value: object, neutral: object) -> bool:
    """Equality of plain values; arrays and the like, whose `==` is no truth, equal none of them."""
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    try:
        return bool(value == neutral)
    except (TypeError, ValueError):
        return False
