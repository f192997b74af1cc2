"""`Auto`: chooses the plan of `plan="auto"` by the job's first rows, and again when lengths turn out otherwise.

The planner (`planning.search`) needs the figures of this node, by its profile (`seesaw profile`) or, of GPUs, by the
catalogue. Without them the fixed rule of `deployment` stands, and there is no `Auto`.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.deployment import Deployment, device_costs, redeploy, transition_mode
from seesaw.scheduling.policies.phased import PhasedPolicy

if TYPE_CHECKING:
    from seesaw.core.request import Request
    from seesaw.planning.candidates import Candidate, Ranking
    from seesaw.planning.search import SearchOptions
    from seesaw.planning.workloads import Workload
    from seesaw.rows import Rows
    from seesaw.scheduling.scheduler import Scheduler
    from seesaw.scheduling.sequence import Sequence as Running

logger = logging.getLogger(__name__)

FIRST_ROWS = 512
"""Rows that are looked at before a plan is chosen."""
UNKNOWN_ROWS = 10_000
"""What a source is taken to have left if it does not say."""
WORTH_SECONDS = 3.0
"""A job that takes less by the closed form is not searched for: a search takes about half of it."""
FAR_OFF = 1.5
"""By this factor outputs must differ from what was assumed of them, before another plan is looked for."""
ENOUGH_FINISHED = 64
"""Sequences that must have finished before their mean says anything."""
WORTH_CHANGING = 0.05
"""Share of the time left that a change of plan must save, its own time included."""
_OBSERVED = 2048
"""Lengths of finished sequences that are kept."""
_REPLAYED_TOKENS = 200_000
"""Output tokens that a search replays at most: about a second."""
_REPLAYED_A_SECOND = 10_000
"""At most so many for each second that the job takes, so that its search takes a small part of it."""


def auto_for(deployment: Deployment) -> Auto | None:
    """What chooses the plan of `deployment` before its ranks start; None if the plan was given or stays by rule."""
    if deployment.options.plan != "auto":
        return None
    reason = deployment.hardware
    if deployment.plan.world == 1:
        reason = "one rank leaves little to choose"
    if isinstance(reason, str):
        hint = "" if deployment.plan.world == 1 else "; `seesaw profile` lets the planner choose"
        logger.info("plan auto: %s by rule, since %s%s", deployment.plan, reason, hint)
        return None
    assert isinstance(deployment.hardware, HardwareSpec)
    return Auto(deployment, deployment.hardware)


@dataclass(slots=True)
class _Assumed:
    """What the present plan was chosen for, and what has been counted since."""

    output: float
    """Mean tokens that a sequence generates."""
    finished: int = 0
    generated: int = 0

    @property
    def mean(self) -> float:
        """Observed since."""
        return self.generated / self.finished

    @property
    def far_off(self) -> bool:
        """Whether enough has been observed and it is far from what was assumed."""
        if self.finished < ENOUGH_FINISHED:
            return False
        return max(self.mean, self.output) > FAR_OFF * min(self.mean, self.output)


class Auto:
    """Decides which plan runs; the engine asks. Not thread-safe."""

    def __init__(self, fallback: Deployment, hardware: HardwareSpec) -> None:
        self.settled = False
        """Whether the plan was chosen for a job that was worth it."""
        self._fallback, self._hardware = fallback, hardware
        self._assumed: _Assumed | None = None
        self._observed: deque[int] = deque(maxlen=_OBSERVED)
        self._told = False

    # ---- before a run -------------------------------------------------------------------------------------

    def choose(self, rows: Rows) -> Deployment:
        """The plan for a job, by its first rows. They are still to be taken."""
        first = rows.look_ahead(FIRST_ROWS)
        longest = self._fallback.memory.max_model_len
        lengths = list(_lengths(first, longest))
        if not lengths:
            return self._fallback
        left = rows.left
        total = max(len(first), UNKNOWN_ROWS) if left is None else left
        job = _workload(lengths, represented=round(total * len(lengths) / len(first)))
        options = self._options(self._context(job))
        rule = replace(options, plans=(self._fallback.plan,))
        seconds = self._seconds(job, rule)
        if seconds < WORTH_SECONDS:
            if not self._told:
                self._told = True
                logger.info("plan auto: %s by rule, since the job is too short to plan", self._fallback.plan)
            return self._fallback
        self.settled = True
        self._assumed = _Assumed(job.mean_output)
        ranking = self._search(job, _within(options, seconds))
        if ranking is None:
            return self._fallback
        logger.info("plan auto: %s", _reason(ranking))
        return redeploy(self._fallback, ranking.best.plan, ranking.best.limits)

    def _context(self, job: Workload) -> int:
        """Tokens that a sequence must be able to reach under any plan.

        Where memory bounds it and the user does not say, all that fits under one plan would rule the others out:
        then it is a quarter of that, or twice what the first rows need.
        """
        fits, options = self._fallback.memory.max_model_len, self._fallback.options
        if options.max_model_len is not None or fits == self._fallback.spec.max_position:
            return fits
        return min(fits, max(fits // 4, 2 * job.longest))

    # ---- between rounds -----------------------------------------------------------------------------------

    def finished(self, sequence: Running) -> None:
        """Note a sequence that ended."""
        if self._assumed is not None:
            self._observed.append(sequence.generated)
            self._assumed.finished += 1
            self._assumed.generated += sequence.generated

    def wants_another(self, scheduler: Scheduler) -> bool:
        """Whether lengths are far from assumed and the scheduler is about to turn back to prefill."""
        if self._assumed is None or not self._assumed.far_off:
            return False
        policy = scheduler.policy
        return isinstance(policy, PhasedPolicy) and policy.turns_back(scheduler)

    def again(
        self, present: Deployment, scheduler: Scheduler, left: int | None, cost: float
    ) -> Deployment | None:
        """The plan for what is left, if it is worth `cost` seconds of changing over to it; None to go on.

        `left` rows are still to be taken from the source, beside those that wait.
        """
        assert self._assumed is not None
        before, now = self._assumed.output, self._assumed.mean
        self._assumed = _Assumed(now)
        waiting = [s for s in scheduler.waiting if s.prompt_tokens < s.limit]
        if not waiting:
            return None
        total = len(waiting) + (UNKNOWN_ROWS if left is None else left)
        job = _workload(self._expected(waiting), represented=total)
        options = self._options(present.memory.max_model_len)
        seconds = self._seconds(job, replace(options, plans=(present.plan,)))
        if seconds < WORTH_SECONDS:
            return None
        options = _within(options, seconds)
        ranking = self._search(job, options)
        if ranking is None:
            return None
        best, stays = ranking.best, self._present_seconds(present, ranking, options)
        says = f"outputs have {now:,.0f} tokens on average, not {before:,.0f} as assumed"
        if best.seconds + cost > (1 - WORTH_CHANGING) * stays:
            logger.info("plan auto: %s; %s stays", says, present.plan)
            return None
        gain = stays / (best.seconds + cost)
        logger.info(
            "plan auto: %s; from %s to %s, %.2fx as fast for what is left",
            says,
            present.plan,
            _reason(ranking),
            gain,
        )
        return redeploy(present, best.plan, best.limits)

    def _expected(self, waiting: Sequence[Running]) -> list[tuple[int, int]]:
        """Lengths of what waits, if it generates what others did: their quantiles, in an order of chance."""
        known, count = sorted(self._observed), len(waiting)
        outputs = [known[(2 * i + 1) * len(known) // (2 * count)] for i in range(count)]
        random.Random(0).shuffle(outputs)
        return [
            (s.prompt_tokens, max(1, min(output, s.limit - s.prompt_tokens)))
            for s, output in zip(waiting, outputs, strict=True)
        ]

    def _present_seconds(self, present: Deployment, ranking: Ranking, options: SearchOptions) -> float:
        """Predicted for the same requests if nothing changes."""
        config = present.scheduler
        same = replace(
            options,
            plans=(present.plan,),
            chunk=config.max_batch_tokens,
            max_running=config.max_running,
            replays=1,
            replayed_tokens=options.replayed_tokens // options.replays,
        )
        ranking_of_one = self._search(ranking.workload, same)
        return ranking.best.seconds if ranking_of_one is None else ranking_of_one.best.seconds

    # ---- the planner --------------------------------------------------------------------------------------

    def _options(self, context: int) -> SearchOptions:
        """What the user fixed stays fixed."""
        from seesaw.planning.search import SearchOptions

        deployment, options = self._fallback, self._fallback.options
        return SearchOptions(
            device_memory=deployment.device_memory,
            host_kv=deployment.host_kv,
            chunk=options.chunk,
            max_running=options.max_running,
            policy=options.policy,
            max_model_len=context,
            block_size=options.block_size,
            transition=transition_mode(options),
            overlap=options.overlap,
            costs=device_costs(options),
            replayed_tokens=_REPLAYED_TOKENS,
        )

    def _seconds(self, job: Workload, options: SearchOptions) -> float:
        from seesaw.planning.search import expected_seconds

        model, dtype = self._fallback.setup.model, self._fallback.dtype
        return expected_seconds(model, self._hardware, job, dtype, options=options)

    def _search(self, job: Workload, options: SearchOptions) -> Ranking | None:
        """None, with a word in the log, if no plan is found; what runs was checked and goes on."""
        from seesaw.planning.search import search

        try:
            return search(
                self._fallback.setup.model, self._hardware, job, self._fallback.dtype, options=options
            )
        except ConfigError as error:
            logger.warning("plan auto: the planner finds none: %s", error)
            return None


def _lengths(requests: Iterable[Request], longest: int) -> Iterable[tuple[int, int]]:
    """(prompt tokens, most output tokens) of each sequence; requests that cannot be served are left out."""
    for request in requests:
        prompt = len(request.prompt_token_ids)
        if 0 < prompt < longest:
            output = max(1, min(request.sampling.max_tokens, longest - prompt))
            yield from [(prompt, output)] * request.sampling.n


def _workload(lengths: Sequence[tuple[int, int]], *, represented: int) -> Workload:
    import numpy as np

    from seesaw.planning.workloads import Workload

    prompt, output = np.array(lengths, dtype=np.int64).T
    return Workload("the job", prompt, output, represented=max(represented, len(lengths)))


def _within(options: SearchOptions, seconds: float) -> SearchOptions:
    """For a job of so many seconds."""
    tokens = min(_REPLAYED_TOKENS, round(_REPLAYED_A_SECOND * min(seconds, _REPLAYED_TOKENS)))
    return replace(options, replayed_tokens=tokens)


def _reason(ranking: Ranking) -> str:
    """What is best, and the prediction that says so."""
    best, static = ranking.best, ranking.best_static
    assert best.setup is not None
    return (
        f"{best.plan}, chunk {best.setup.scheduler.max_batch_tokens} "
        f"(predicted {best.rate:,.0f} tokens/s{_beside(best, static)})"
    )


def _beside(best: Candidate, static: Candidate | None) -> str:
    if static is None:
        return ""
    return (
        "; no plan of two phases is faster"
        if static is best
        else f"; best static {static.plan} with {static.rate:,.0f}"
    )
