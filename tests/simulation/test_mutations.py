"""Every invariant catches what it is there for: engines broken on purpose do not get through."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.job import run
from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.violations import Violation
from tests.simulation.watch import INVARIANTS

# A violation leaves an engine in the middle of a step, which its generator meets again when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SEEDS = 400
"""Within so many jobs a mutation is caught."""
TWICE = 5
"""Of so many jobs, one is run again."""


def violations() -> Iterator[Violation]:
    """What is violated, job by job. The jobs grow."""
    for seed in range(SEEDS):
        size = 1 + 8 * seed // SEEDS
        try:
            watch = run(seed, size)
            if seed % TWICE == 0 and run(seed, size).trace != watch.trace:
                yield Violation("same trace", f"seed {seed}, size {size}")
        except Violation as violation:
            yield violation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_engine_is_caught(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="seesaw")
    mutation.apply(monkeypatch)
    found: list[str] = []
    for violation in violations():
        found.append(str(violation))
        if violation.invariant == mutation.caught_by:
            return
    pytest.fail(f"{mutation.name} gets through {SEEDS} jobs; {mutation.caught_by!r} is not among {found[:5]}")


def test_every_invariant_has_a_mutation() -> None:
    assert {mutation.caught_by for mutation in MUTATIONS} == set(INVARIANTS)
