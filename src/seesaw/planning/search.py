"""Plan search: all plans in closed form, the best few replayed in the twin.

The closed form (`planning.estimate`) scores every pair of layouts with every chunk, batch and number of
micro-batches; it is cheap because what a layout does in a phase (`planning.pace`) does not depend on the other
phase. The twin then runs the scheduler itself over the real lengths, and its times decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import cast

import msgspec
import numpy as np

from seesaw.core.actions import DECODE
from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Plan
from seesaw.core.model_spec import DType
from seesaw.planning.bound import bound
from seesaw.planning.candidates import Candidate, Ranking
from seesaw.planning.fits import nothing_fits
from seesaw.planning.scoring import BATCHES, CHUNKS, FORWARD_IN_TOKENS, Scored, Scorer, SearchOptions
from seesaw.planning.setup import Setup, set_up
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.statistics import statistics
from seesaw.planning.twin import simulate
from seesaw.planning.workloads import Workload
from seesaw.scheduling.config import TurnCosts


def search(
    model: PlannedModel,
    hardware: HardwareSpec,
    workload: Workload,
    dtype: str = "bfloat16",
    *,
    options: SearchOptions,
) -> Ranking:
    """Rank the plans of `model` on `hardware` for `workload`.

    Raises `MemoryBudgetError` if no plan fits, saying what would.
    """
    scorer = Scorer(model, hardware, statistics(workload), dtype, options)
    scored = sorted(scorer.scored(), key=lambda one: one.estimate.seconds)
    replayer = _Replayer(scorer, workload, scored[0] if scored else None)
    replayed = sorted(replayer.replay_best(scored), key=lambda candidate: candidate.seconds)
    if not replayed:
        raise nothing_fits(model, hardware, scorer.limits(chunk=CHUNKS[0], max_running=BATCHES[0]))
    done = {candidate.plan for candidate in replayed}
    return Ranking(
        model=model,
        hardware=hardware,
        workload=workload,
        dtype=dtype,
        replayed=tuple(replayed),
        others=tuple(
            replayer.candidate(one)
            for one in scored
            if one.plan not in done and str(one.plan) not in scorer.refused
        ),
        bound=bound(model, _with_memory(hardware, options), workload, dtype, max_resident_tokens=None),
        refused=tuple(scorer.refused.items()),
        considered=scorer.considered,
    )


def expected_seconds(
    model: PlannedModel, hardware: HardwareSpec, workload: Workload, dtype: str, *, options: SearchOptions
) -> float:
    """Of the whole job under the best of `options.plans`, in closed form; infinite if memory allows none of them."""
    scorer = Scorer(model, hardware, statistics(workload), dtype, options)
    return min((one.estimate.seconds for one in scorer.scored()), default=inf)


def turn_costs(setup: Setup, hardware: HardwareSpec, workload: Workload) -> TurnCosts:
    """What a search over `workload` would expect turning back to cost under a plan that was worked out."""
    config = setup.scheduler
    options = SearchOptions(device_memory=0, host_kv=0, block_size=config.block_size)
    scorer = Scorer(setup.model, hardware, statistics(workload), setup.dtype, options)
    return scorer.turn_costs(setup.plan, config.max_batch_tokens, config.groups(DECODE))


class _Replayer:
    """Runs the scheduler over the lengths of a job, or over an even sample of them."""

    def __init__(self, scorer: Scorer, workload: Workload, best: Scored | None) -> None:
        self._scorer, self._workload = scorer, workload
        self._sample = _sample(workload, scorer.options, best) if best else workload
        self._done: set[Plan] = set()

    def replay_best(self, scored: Sequence[Scored]) -> Iterator[Candidate]:
        """The best plans, as many as asked for and exact memory allows; the best of one layout among them.

        Up to as many again while an estimate is better than the best that was replayed.
        """
        left, best = self._scorer.options.replays, inf
        static_wanted = not all(one.plan.separate for one in scored)
        for one in scored:
            if left <= static_wanted and one.plan.separate:
                continue  # the last place is for the best of one layout
            candidate = self._replay(one)
            if candidate is None:
                continue
            left -= 1
            static_wanted = static_wanted and one.plan.separate
            best = min(best, candidate.seconds)
            yield candidate
            if left == 0:
                break
        yield from self._doubted(scored, best)

    def _doubted(self, scored: Sequence[Scored], best: float) -> Iterator[Candidate]:
        """Plans whose estimate says that they beat what was replayed."""
        left = self._scorer.options.replays
        for one in scored:
            if left == 0 or one.estimate.seconds >= best:
                return
            if one.plan not in self._done:
                candidate = self._replay(one)
                if candidate is not None:
                    left -= 1
                    best = min(best, candidate.seconds)
                    yield candidate

    def candidate(self, one: Scored) -> Candidate:
        """As estimated."""
        return Candidate(plan=one.plan, limits=one.limits, workload=self._workload, estimate=one.estimate)

    def _replay(self, one: Scored) -> Candidate | None:
        """None if exact memory refuses the plan."""
        scorer, sample = self._scorer, self._sample
        self._done.add(one.plan)
        try:
            setup = set_up(scorer.model, one.plan, cast(DType, scorer.dtype), one.limits)
        except MemoryBudgetError as error:
            scorer.refused[str(one.plan)] = str(error)
            return None
        simulated = simulate(setup, scorer.hardware, sample)
        return replace(self.candidate(one), setup=setup, simulated=simulated, scale=self._scale(one))

    def _scale(self, one: Scored) -> float:
        """How much longer the whole job takes than the sample, by the closed form."""
        if len(self._sample) == self._workload.requests:
            return 1.0
        limits = one.limits
        options = replace(
            self._scorer.options, plans=(one.plan,), chunk=limits.chunk, max_running=limits.max_running
        )
        of_sample = Scorer(
            self._scorer.model, self._scorer.hardware, statistics(self._sample), self._scorer.dtype, options
        )
        return one.estimate.seconds / next(of_sample.scored()).estimate.seconds


def _with_memory(hardware: HardwareSpec, options: SearchOptions) -> HardwareSpec:
    """With no less memory than the plans may use: on CPU ranks a user may give more than was profiled."""
    return msgspec.structs.replace(hardware, memory=max(hardware.memory, options.device_memory))


def _sample(workload: Workload, options: SearchOptions, best: Scored) -> Workload:
    """As many requests as the replays can take, evenly over the job; `best` tells how many Forwards they make."""
    layout, output = best.plan.decode, workload.mean_output
    steps = output * layout.dp * layout.pp / best.estimate.batch
    forwards = steps + workload.mean_prompt / (best.limits.chunk or workload.mean_prompt)
    tokens = options.replayed_tokens / options.replays
    count = max(1, min(len(workload), int(tokens / (output + FORWARD_IN_TOKENS * forwards))))
    picked = np.linspace(0, len(workload) - 1, count).round().astype(np.int64)
    return replace(
        workload,
        prompt=workload.prompt[picked],
        output=workload.output[picked],
        arrival_s=None,
        represented=None,
    )


__all__ = ["SearchOptions", "expected_seconds", "search", "turn_costs"]
