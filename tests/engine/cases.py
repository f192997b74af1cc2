"""The plans, policies and loops under which the engine is compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from seesaw.core.layout import Layout, Plan

STATIC_POLICIES = ("chunked", "prefill-first", "decode-first")
PHASED_POLICIES = ("seesaw", "prefill-first", "decode-first")


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    plan: str
    policy: str
    overlap: bool

    def __str__(self) -> str:
        return f"{self.plan}-{self.policy}-{'overlap' if self.overlap else 'sync'}"


def layouts(world: int) -> list[Layout]:
    """Every layout of `world` ranks."""
    degrees = [d for d in range(1, world + 1) if world % d == 0]
    triples = [(d, p, t) for d, p, t in product(degrees, repeat=3) if d * p * t == world]
    return [Layout(d, p, t) for d, p, t in triples]


def plans(world: int) -> list[Plan]:
    """Every static plan and every plan with two phases over `world` ranks."""
    every = layouts(world)
    static = [Plan(layout, layout, separate=False) for layout in every]
    return static + [Plan(a, b, separate=True) for a, b in product(every, every)]


def cases(world: int) -> Iterator[Case]:
    """Every plan under every policy it allows, in both loops."""
    for plan in plans(world):
        for policy in PHASED_POLICIES if plan.separate else STATIC_POLICIES:
            for overlap in (True, False):
                yield Case(str(plan), policy, overlap)


def rotated(worlds: tuple[int, ...], turn: int) -> list[Case]:
    """Every plan once; which policy and loop it gets rotates with the plan and with `turn`."""
    chosen = []
    for i, plan in enumerate(p for world in worlds for p in plans(world)):
        policies = PHASED_POLICIES if plan.separate else STATIC_POLICIES
        chosen.append(Case(str(plan), policies[(i + turn) % 3], bool((i + turn) % 2)))
    return chosen
