"""Where the time of a Seesaw contestant's ranks went, by phase and function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from seesaw.execution.profiling import PhaseProfile

MANY = 0.01
"""Functions with less than this share of a phase are shown together."""
REST = "rest: Python and small operators"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """One phase, means over the ranks: of a step (one Forward) and of each function in it, in seconds."""

    forwards: int
    """Of the rank that ran most."""
    tokens: float
    """Of a step."""
    seconds: float
    functions: dict[str, float]
    """The longest first; the last one is what the timed functions leave of `seconds`."""


def read_profiles(folder: Path) -> dict[str, PhaseTimes]:
    """What the ranks wrote into `folder` (`execution.profiling`), by phase; empty if they did not."""
    from seesaw.execution.profiling import PhaseProfile

    kind = dict[str, PhaseProfile]
    ranks = [msgspec.json.decode(path.read_bytes(), type=kind) for path in sorted(folder.glob("rank*.json"))]
    by_phase: dict[str, list[PhaseProfile]] = defaultdict(list)
    for rank in ranks:
        for name, phase in rank.items():
            if phase.forwards:
                by_phase[name].append(phase)
    return {name: _means(phases) for name, phases in by_phase.items()}


def _means(phases: list[PhaseProfile]) -> PhaseTimes:
    forwards = sum(phase.forwards for phase in phases)
    seconds = sum(phase.seconds for phase in phases) / forwards
    functions: dict[str, float] = defaultdict(float)
    for phase in phases:
        for name, function in phase.functions.items():
            functions[name] += function.seconds / forwards
    ordered = dict(sorted(functions.items(), key=lambda item: -item[1]))
    return PhaseTimes(
        forwards=max(phase.forwards for phase in phases),
        tokens=sum(phase.tokens for phase in phases) / forwards,
        seconds=seconds,
        functions={**ordered, REST: max(0.0, seconds - sum(ordered.values()))},
    )
