"""Thousands of jobs on simulated ranks that die, hang back and report out of order; none may violate anything."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from tests.simulation.job import run
from tests.simulation.violations import Violation
from tests.simulation.watch import Tally, Watch

CHUNK = 250
"""Seeds of one test."""
SIZES = (1,) * 8 + (2,) * 7 + (3,) * 3 + (4, 6)
"""Of the jobs of each chunk: what fails is found in small jobs first."""
TWICE = 25
"""Of so many jobs, one is run again."""


@pytest.fixture(autouse=True)
def quick(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Losses are what these jobs are made of: no log. They are small, so that their rubbish can wait."""
    caplog.set_level(logging.ERROR, logger="seesaw")
    gc.disable()
    yield
    gc.enable()


def simulated(seed: int, size: int) -> Watch:
    """The watched job of a seed; a violation says how to repeat it."""
    try:
        return run(seed, size)
    except Violation as violation:
        again = f"python -m tests.simulation {seed} {size}"
        raise Violation(
            violation.invariant, f"{violation.detail}\nseed {seed}; to repeat: {again}"
        ) from violation


def many(seeds: range, size: int) -> Tally:
    """What all of these went through."""
    tally = Tally()
    for seed in seeds:
        watch = simulated(seed, size)
        tally.add(watch.tally)
        if seed % TWICE == 0 and simulated(seed, size).trace != watch.trace:
            raise Violation("same trace", f"seed {seed}, size {size}")
    return tally


@pytest.mark.parametrize("chunk", range(len(SIZES)))
def test_jobs(chunk: int) -> None:
    tally = many(range(chunk * CHUNK, (chunk + 1) * CHUNK), SIZES[chunk])
    assert tally.jobs == CHUNK and tally.engines > CHUNK, tally
    assert min(tally.losses, tally.stopped, tally.killed, tally.closes, tally.no_layout) > 5, tally


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 10, 16, 24, 40])
def test_larger_jobs(size: int) -> None:
    first = size * 1_000_000
    tally = many(range(first, first + 12_000 // size), size)
    assert min(tally.losses, tally.kept, tally.rescued, tally.lost_in_recovery, tally.changes) > 20, tally
