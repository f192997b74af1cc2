"""One seeded job from its first row to its last, over as many engines as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from seesaw.auto import Auto
from seesaw.core.errors import ConfigError, EngineError, WorkerError
from seesaw.core.request import CompletionOutput, Request, RequestOutput
from seesaw.deployment import Deployment, redeploy
from seesaw.engine import Engine
from seesaw.planning.setup import Limits
from seesaw.rows import Rows
from seesaw.scheduling.policies.phased import PhasedPolicy
from seesaw.scheduling.scheduler import Scheduler
from tests.simulation.ranks import Killed, Ranks
from tests.simulation.room import fitting
from tests.simulation.toy import Answer, ToyTokenizer, answers
from tests.simulation.violations import Violation, hold
from tests.simulation.watch import Watch
from tests.simulation.world import Fault, Job, SourceError, job_of, random_plan, source

if TYPE_CHECKING:
    from seesaw.text import Tokenizer

_ENGINES = 40
"""More of them than any job has faults."""


def run(seed: int, size: int, *, log: list[str] | None = None) -> Watch:
    """Run the job of a seed. Raises a `Violation`."""
    try:
        return _Run(job_of(seed, size), Watch(log=log)).whole()
    except Violation:
        raise
    except Exception as error:
        raise Violation("no crash", f"{type(error).__name__}: {error}") from error


class RandomAuto(Auto):
    """A `plan="auto"` that changes its mind by chance, where the engine allows it to."""

    def __init__(self, run: _Run) -> None:
        self.settled = False
        self._run, self._fallback = run, run.job.deployment
        self._rng = run.job.rng

    def choose(self, rows: Rows) -> Deployment:
        """Any plan, by as many rows as it likes."""
        rows.look_ahead(self._rng.choice((1, 5, 512)))
        self.settled = self._rng.random() < 0.5
        return self._other(self._fallback) or self._fallback

    def finished(self, sequence: object) -> None:
        """Nothing is learnt."""

    def wants_another(self, scheduler: Scheduler) -> bool:
        """Now and then."""
        policy = scheduler.policy
        return (
            self._run.changes > 0
            and isinstance(policy, PhasedPolicy)
            and policy.turns_back(scheduler)
            and self._rng.random() < 0.7
        )

    def again(
        self, present: Deployment, scheduler: Scheduler, left: int | None, cost: float
    ) -> Deployment | None:
        """Any plan with room for what there is."""
        self._run.changes -= 1
        return self._other(present)

    def _other(self, present: Deployment) -> Deployment | None:
        options = present.options
        limits = Limits(
            device_memory=present.device_memory,
            host_kv=present.host_kv,
            chunk=self._rng.choice((options.chunk, 8)),
            max_running=self._rng.choice((present.scheduler.max_running, 3)),
            block_size=options.block_size,
            max_model_len=present.memory.max_model_len,
        )
        for _ in range(6):
            separate = present.plan.separate and self._rng.random() < 0.7
            try:
                return redeploy(
                    present, random_plan(self._rng, present.plan.world, separate=separate), limits
                )
            except ConfigError:
                continue
        return None


@dataclass(slots=True)
class _Run:
    """The state of a job between engines: what a journal would hold."""

    job: Job
    watch: Watch
    answered: dict[str, RequestOutput] = field(default_factory=dict)
    changes: int = 0
    """Changes of plan that are left."""
    _closes: list[int] = field(default_factory=list)
    _source_fails: int | None = None
    _pulled: dict[str, int] = field(default_factory=dict)
    """How many plans there had been when a row was last pulled."""

    def whole(self) -> Watch:
        """From the first row to the last."""
        self.changes, self._closes = self.job.changes, list(self.job.closes)
        self._source_fails = self.job.source_fails
        self.watch.work = sum(_most_tokens(row) for row in self.job.rows)
        tally = self.watch.tally
        tally.jobs += 1
        faults = list(self.job.faults)
        while len(self.answered) < len(self.job.rows):
            hold(tally.engines < _ENGINES, "stops", "the job is resumed without end")
            tally.engines += 1
            self._one_engine(faults)
        return self.watch

    # ---- one engine ---------------------------------------------------------------------------------------

    def _one_engine(self, faults: list[Fault]) -> None:
        ranks = Ranks(self.job, faults, self.watch)
        tokenizer = cast("Tokenizer", ToyTokenizer()) if self.job.speaks else None
        auto = RandomAuto(self) if self.job.auto else None
        deployment = self.job.deployment
        try:
            if auto is None:
                ranks.start(deployment)
            engine = Engine(deployment, ranks, tokenizer, start=ranks.start, auto=auto)
            self.watch.attach(engine)
            while len(self.answered) < len(self.job.rows) and self._serve(engine, ranks):
                pass
        except Killed:
            self.watch.tally.killed += 1
        except EngineError as error:
            hold(error is ranks.raised, "stops", f"no engine was there yet, and: {error}")
        finally:
            self.watch.detach()

    def _serve(self, engine: Engine, ranks: Ranks) -> bool:
        """Run the rows that are left; whether the engine can go on."""
        left = [row for row in self.job.rows if row.id not in self.answered]
        try:
            closed = self._consume(engine.run(self._rows(left)))
        except SourceError:
            self._source_fails = None
        except EngineError as error:
            self._check_end(engine, ranks, error)
        else:
            if not closed or engine._lost is None:
                self._check_rest(engine)
            hold(closed or len(self.answered) == len(self.job.rows), "once", "a row was never answered")
            return True
        self._check_refuses(engine)
        return False

    def _rows(self, left: list[Request]) -> Iterator[Request]:
        for row in source(left, self._source_fails):
            self._pulled[row.id] = max(len(self.watch.lengths) - 1, 0)
            yield row

    def _consume(self, outputs: Iterator[RequestOutput]) -> bool:
        """Take outputs in until they end or the consumer has had enough; whether that was so."""
        for output in outputs:
            self._take(output)
            if self._enough():
                self.watch.tally.closes += 1
                self.watch.note("close", "")
                outputs.close()  # type: ignore[attr-defined]
                return True
        return False

    def _enough(self) -> bool:
        if self._closes and len(self.answered) >= self._closes[0]:
            del self._closes[0]
            return True
        return False

    # ---- outputs ------------------------------------------------------------------------------------------

    def _take(self, output: RequestOutput) -> None:
        id = output.request_id
        self.watch.note("output", id)
        hold(id not in self.answered, "once", f"{id} is answered twice")
        row = next((row for row in self.job.rows if row.id == id), None)
        hold(row is not None, "once", f"nobody asked for {id!r}")
        assert row is not None
        self.answered[id] = output
        lengths = set(self.watch.lengths[self._pulled[id] :])
        seed = self.job.deployment.options.seed
        right = [answers(row, n, seed=seed, speaks=self.job.speaks) for n in sorted(lengths)]
        tally = self.watch.tally
        if output.error is not None:
            tally.refused += 1
            hold(output.error.code in right and not output.outputs, "refusals", f"{id}: {output.error!r}")
            return
        tally.outputs += 1
        tally.tokens += sum(len(o.token_ids) for o in output.outputs)
        given = [_answer(o) for o in output.outputs]
        hold(given in right, "tokens", f"{id}: {given} is not {right}")
        hold(
            [o.index for o in output.outputs] == list(range(row.sampling.n)),
            "tokens",
            f"{id}: its completions",
        )

    # ---- ends ---------------------------------------------------------------------------------------------

    def _check_rest(self, engine: Engine) -> None:
        self.watch.check()
        scheduler = engine._scheduler
        left = {
            "sequences": scheduler.unfinished,
            "host blocks": scheduler.host.used,
            "jobs": len(engine._jobs),
            "texts": len(engine._texts),
            "outputs": len(engine._done),
            "device blocks": sum(replica.pool.used for replica in scheduler.replicas),
            "places": sum(replica.resident for replica in scheduler.replicas),
            "queues": len(scheduler.waiting) + len(scheduler.hosted) + scheduler.swapping_out,
        }
        hold(not any(left.values()), "nothing remains", str(left))

    def _check_end(self, engine: Engine, ranks: Ranks, error: EngineError) -> None:
        """An error ended the engine. It must be one that was brought up, and one that nothing could be done about."""
        self.watch.tally.stopped += 1
        self.watch.note("stopped", str(error))
        cause = ranks.raised
        hold("stands still" not in str(error), "no deadlock", str(error))
        hold(cause is not None, "no deadlock", str(error))
        if (
            not isinstance(cause, WorkerError)
            or not ranks.lost
            or engine._deployment.options.on_rank_loss == "stop"
        ):
            hold(error is cause, "stops", f"{error} instead of {cause}")
            return
        if error is cause:
            hold(not ranks.started, "recovery", f"{error} ended the job")
            return
        hold(str(error).startswith(str(cause)), "stops", f"{error} instead of {cause}")
        hold(cause.rank == cause.lost[0], "stops", str(error))
        self.watch.tally.no_layout += 1
        left = engine._deployment.plan.world - len(cause.lost)
        longest = max((s.limit for s in engine._scheduler.live()), default=1)
        if engine._deployment.options.max_model_len is not None:
            longest = engine._deployment.memory.max_model_len
        hold(not fitting(engine._deployment, left, longest), "recovery", f"{error}; yet there is a plan")

    def _check_refuses(self, engine: Engine) -> None:
        """An engine that an exception went through serves no more."""
        if not engine._up:
            return
        try:
            next(engine.run(iter(())), None)
        except (EngineError, Violation) as error:
            hold("make a new one" in str(error), "stops", f"a broken engine goes on, to {error}")
            return
        raise Violation("stops", "a broken engine goes on")


def _most_tokens(row: Request) -> int:
    return (len(row.prompt_token_ids) + row.sampling.max_tokens) * row.sampling.n


def _answer(output: CompletionOutput) -> Answer:
    logprobs = None if output.logprobs is None else tuple(output.logprobs)
    return Answer(
        tuple(output.token_ids), output.text, output.finish_reason or "", output.stop_reason, logprobs
    )
