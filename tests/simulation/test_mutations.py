"""Every invariant catches what it is there for: engines broken on purpose do not get through."""

from __future__ import annotations

import logging

import pytest

from tests.simulation.job import run
from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.violations import Violation
from tests.simulation.watch import INVARIANTS

SEEDS = 400
"""Within so many jobs a mutation is caught."""


def caught(seeds: range) -> Violation | None:
    """The first violation."""
    for seed in seeds:
        size = 1 + 8 * (seed - seeds.start) // len(seeds)
        try:
            watch = run(seed, size)
            if seed % 5 == 0 and run(seed, size).trace != watch.trace:
                return Violation("same trace", f"seed {seed}")
        except Violation as violation:
            return violation
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_engine_is_caught(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="seesaw")
    mutation.apply(monkeypatch)
    found = caught(range(SEEDS))
    assert found is not None, f"{mutation.name} gets through {SEEDS} jobs"
    assert found.invariant == mutation.caught_by, found


def test_every_invariant_has_a_mutation() -> None:
    assert {mutation.caught_by for mutation in MUTATIONS} == set(INVARIANTS)
