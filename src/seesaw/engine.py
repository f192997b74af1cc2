"""`Engine`: the loop that joins the scheduler to an executor and tokens to text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from seesaw.core.actions import Action, ChosenToken
from seesaw.core.errors import EngineError, RequestError, WorkerError
from seesaw.core.request import CompletionOutput, Request, RequestOutput, TokenLogprob
from seesaw.core.stats import EngineStats, RankLoss
from seesaw.elastic import without
from seesaw.execution.base import Executor
from seesaw.metering import Meter
from seesaw.recording.bounded import History
from seesaw.recording.tracing import EngineTrace
from seesaw.rows import Rows
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence
from seesaw.text import TextState, Tokenizer

if TYPE_CHECKING:
    from seesaw.auto import Auto
    from seesaw.deployment import Deployment

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """A request being served: its sequences, ended and not."""

    request: Request
    left: int
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None


class Engine:
    """Serves requests until their source is exhausted.

    Owns the loop and the text of running sequences; the scheduler owns tokens and blocks, the executor the
    ranks. Not thread-safe: one `run` at a time.
    """

    def __init__(
        self,
        deployment: Deployment,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        start: Callable[[Deployment], None] | None = None,
        auto: Auto | None = None,
        trace: EngineTrace | None = None,
    ) -> None:
        """`start` ends the ranks that there are and starts those of a deployment, over the same host memory; without
        it the ranks are what they are. With `auto`, ranks are started when the first rows are known, and `deployment`
        is a stand-in until then. What the control process does is told to `trace` as well."""
        assert auto is None or start is not None
        self._deployment, self._executor, self._tokenizer = deployment, executor, tokenizer
        self._start, self._auto = start, auto
        self._up = auto is None
        """Whether the ranks have been started."""
        self._scheduler = Scheduler(deployment.scheduler, create_policy(deployment.scheduler))
        self._jobs: dict[int, _Job] = {}
        """By sequence id; the sequences of one request share a job."""
        self._texts: dict[int, TextState] = {}
        """Text so far of the sequences that have stop strings."""
        self._eos = frozenset(deployment.spec.eos_token_ids) | frozenset(
            tokenizer.eos_token_ids if tokenizer is not None else ()
        )
        self._meter = Meter(deployment.plan.separate, deployment.memory.mode, _layouts(deployment), trace)
        if trace is not None:
            trace.stats = self.stats
        self._ended: list[Sequence] = []
        """Sequences that have ended and are still to be put into outputs."""
        self._done: list[RequestOutput] = []
        self._broken = False
        """Whether an exception left scheduler and ranks out of step."""
        self._lost: WorkerError | None = None
        """What went wrong while a run was given up."""
        self._failed = 0
        self._finished = 0
        self._started = self._meter.started
        self._start_seconds = 0.0
        """From the first row until ranks that `auto` chose were ready."""
        self._change_seconds = 0.0
        """What the latest start of ranks took."""
        self._losses: list[RankLoss] = []

    @property
    def deployment(self) -> Deployment:
        """What runs at present."""
        return self._deployment

    # ---- the loop -----------------------------------------------------------------------------------------

    def run(self, requests: Iterator[Request]) -> Iterator[RequestOutput]:
        """Serve `requests`, pulled as there is room for them; yields each as soon as it is whole.

        A request that cannot be served comes out with `error` set. Raises `EngineError` if a rank fails and the
        others cannot, or are not to, go on without it.
        Closing the iterator early gives the remaining requests up; the engine can serve again afterwards, which
        it cannot after any exception.
        """
        if self._broken:
            raise EngineError(
                "the engine was stopped in the middle of a step and cannot go on; make a new one"
            )
        rows = Rows(requests)
        if self._lost is not None:
            self._recover(self._lost)
        if self._auto is not None:
            self._prepare(rows, self._auto)
        try:
            while True:
                self._take_in(rows)
                if rows.ended and not self._scheduler.unfinished:
                    yield from self._take_done()
                    return
                self._withstand(partial(self._submit, rows))
                # what no action waits for is done while the ranks compute
                yield from self._take_done()
                self._take_in(rows)
                self._withstand(self._await)
        except GeneratorExit:
            self._broken = True  # unless the ranks come to rest
            try:
                self._give_up()  # between two steps, so that the books and the ranks agree
                self._broken = False
            except WorkerError as error:
                self._lost = error  # whoever gives up needs no ranks; the next run sees to it
                self._broken = False
            except EngineError:
                logger.debug("the ranks were ended before the run was", exc_info=True)
            raise
        except BaseException:
            self._broken = True
            raise
        finally:
            self._meter.rest()

    def _withstand(self, step: Callable[[], None]) -> None:
        """Carry out half of a turn; if ranks are lost on the way, the others take over."""
        self._meter.begin()
        try:
            step()
        except WorkerError as error:
            self._go_on_without(error)
        self._meter.end()

    def _take_in(self, rows: Rows) -> None:
        while not rows.ended and self._scheduler.wants_requests:
            request = next(rows, None)
            if request is not None:
                self._add(request)
        self._scheduler.more_expected = not rows.ended

    def _add(self, request: Request) -> None:
        try:
            self._check(request)
            stops = frozenset(request.sampling.stop_token_ids)
            sequences = self._scheduler.add(
                request, stops if request.sampling.ignore_eos else stops | self._eos
            )
        except RequestError as error:
            self._failed += 1
            self._done.append(
                RequestOutput(
                    request_id=request.id,
                    prompt=request.prompt,
                    prompt_token_ids=request.prompt_token_ids,
                    error=error,
                )
            )
            return
        job = _Job(request, len(sequences))
        for sequence in sequences:
            self._jobs[sequence.id] = job
            if request.sampling.stop and self._tokenizer is not None:
                self._texts[sequence.id] = TextState(self._tokenizer, request.sampling)

    def _check(self, request: Request) -> None:
        vocab, prompt = self._deployment.spec.vocab, request.prompt_token_ids
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab:
            outside = next(token for token in prompt if not 0 <= token < vocab)
            raise RequestError(
                f"prompt token {outside} is outside the vocabulary of {vocab}",
                code="invalid_token",
                param="prompt",
            )
        if request.sampling.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokeniser; use stop_token_ids", code="no_tokenizer", param="stop"
            )

    def _submit(self, rows: Rows) -> None:
        if self._auto is not None and self._auto.wants_another(self._scheduler):
            self._plan_again(rows, self._auto)
        actions = self._scheduler.schedule()
        self._hand_over(actions)
        if not actions and not self._scheduler.in_flight:
            raise EngineError(
                f"the scheduler stands still with {self._scheduler.unfinished} sequences unfinished; this is a bug"
            )
        self._meter.scheduled()

    def _hand_over(self, actions: list[Action]) -> None:
        for action in actions:
            self._meter.submitted(action)
            self._executor.submit(action)

    def _await(self) -> None:
        """Wait for completions and take them in, unless nothing is to come."""
        if not self._scheduler.in_flight:
            return
        before = time.monotonic()
        completions = self._executor.wait()
        self._meter.waited(time.monotonic() - before, completions)
        for completion in completions:
            for sequence in self._scheduler.complete(completion):
                self._watch_text(sequence)
        self._ended += self._scheduler.take_finished()
        self._meter.taken_in()

    def _watch_text(self, sequence: Sequence) -> None:
        """Feed the new token of a sequence with stop strings to its text; end it when one appears."""
        text = self._texts.get(sequence.id)
        silent = sequence.ended_by_token and not sequence.request.sampling.include_stop_str_in_output
        if text is not None and not silent:
            stop = text.push(sequence.tokens[-1])
            if stop is not None:
                if sequence.finish_reason is None:
                    self._scheduler.finish(sequence, "stop", stop)
                else:
                    sequence.finish_reason, sequence.stop_reason = "stop", stop

    def _finish(self, sequence: Sequence) -> None:
        self._meter.finished(sequence.prompt_tokens, sequence.generated)
        job = self._jobs.pop(sequence.id)
        job.outputs.append(self._output(sequence))
        if job.request.sampling.prompt_logprobs is not None and sequence.index == 0:
            job.prompt_logprobs = self._prompt_logprobs(sequence)
        job.left -= 1
        if job.left == 0:
            job.outputs.sort(key=lambda output: output.index)
            self._finished += 1
            self._done.append(
                RequestOutput(
                    request_id=job.request.id,
                    prompt=job.request.prompt,
                    prompt_token_ids=job.request.prompt_token_ids,
                    outputs=job.outputs,
                    prompt_logprobs=job.prompt_logprobs,
                )
            )

    def _output(self, sequence: Sequence) -> CompletionOutput:
        tokens, sampling = sequence.output_token_ids, sequence.request.sampling
        state = self._texts.pop(sequence.id, None)
        text = ""
        if state is not None:
            text = state.finish()
        elif self._tokenizer is not None and sampling.detokenize:
            silent = sequence.ended_by_token and not sampling.include_stop_str_in_output
            said = tokens[:-1] if silent else tokens
            text = self._tokenizer.decode(said, skip_special_tokens=sampling.skip_special_tokens)
        return CompletionOutput(
            index=sequence.index,
            token_ids=tokens,
            text=text,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=self._logprobs(tokens, sequence.logprobs),
        )

    def _logprobs(
        self, tokens: list[int], chosen: list[ChosenToken | None]
    ) -> list[dict[int, TokenLogprob]] | None:
        if not chosen:
            return None
        positions = []
        for token, choice in zip(tokens, chosen, strict=True):
            assert choice is not None
            positions.append(self._entries(token, choice))
        return positions

    def _prompt_logprobs(self, sequence: Sequence) -> list[dict[int, TokenLogprob] | None]:
        """By position of the prompt, whose tokens from `first_score` on were asked for."""
        first, prompt = sequence.first_score, sequence.request.prompt_token_ids
        scored = zip(prompt[first:], sequence.prompt_logprobs, strict=True)
        return [None] * first + [self._entries(token, choice) for token, choice in scored]

    def _entries(self, token: int, choice: ChosenToken) -> dict[int, TokenLogprob]:
        entries = {token: TokenLogprob(choice.logprob, choice.rank, self._token_text(token))}
        for rank, (other, logprob) in enumerate(choice.top, 1):
            entries.setdefault(other, TokenLogprob(logprob, rank, self._token_text(other)))
        return entries

    def _token_text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)

    def _take_done(self) -> list[RequestOutput]:
        """Outputs that are whole, with the text of the sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        for sequence in ended:
            if self._auto is not None:
                self._auto.finished(sequence)
            self._finish(sequence)
        done, self._done = self._done, []
        return done

    def _give_up(self) -> None:
        """End what is unfinished and let the ranks come to rest, so that another `run` starts clean."""
        for sequence in self._scheduler.live():
            self._scheduler.finish(sequence, "abort")
        self._scheduler.take_finished()
        for left in (self._jobs, self._texts, self._ended, self._done):
            left.clear()
        self._rest()

    def _rest(self) -> None:
        """Wait until nothing is in flight."""
        while self._scheduler.in_flight:
            self._await()

    # ---- plan auto ----------------------------------------------------------------------------------------

    def _prepare(self, rows: Rows, auto: Auto) -> None:
        """Choose the plan by the first rows, unless that was done, and have its ranks up."""
        began = time.monotonic()
        wanted = self._deployment if auto.settled and self._up else auto.choose(rows)
        if rows.ended:
            return  # there are no rows
        if not self._up:
            self._start_up(wanted)
            self._start_seconds = time.monotonic() - began
        elif wanted.setup != self._deployment.setup:
            self._start_up(wanted)

    def _plan_again(self, rows: Rows, auto: Auto) -> None:
        """Look for a better plan for what is left, and change over to it."""
        began = time.monotonic()
        better = auto.again(self._deployment, self._scheduler, rows.left, self._change_seconds)
        if better is not None:
            self._hand_over(self._scheduler.retire())
            self._rest()
            resting = time.monotonic()
            self._change(better)
            self._meter.changed(resting)
        logger.debug("planning again took %.2f s", time.monotonic() - began)

    # ---- other ranks --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Have the ranks of the deployment up, or those of another if some are lost meanwhile. Raises `StartupError`,
        or `WorkerError` if the others cannot do without them."""
        self._start_up(self._deployment)

    def _start_up(self, wanted: Deployment) -> None:
        try:
            self._rest()
            self._change(wanted)
        except WorkerError as error:
            self._go_on_without(error)

    def _go_on_without(self, error: WorkerError) -> None:
        """Have the ranks that are left take over. Raises `error`, or what comes of it, if that cannot be."""
        while True:
            began = time.monotonic()
            if self._start is None or not error.lost or self._deployment.options.on_rank_loss == "stop":
                raise error
            restarted = self._scheduler.lose_devices()
            self._meter.lost()
            live = self._scheduler.live()
            left = without(self._deployment, error, longest=max((s.limit for s in live), default=1))
            logger.warning("%s; going on under %s with the ranks that are left", error, left.plan)
            before, self._deployment, self._auto = self._deployment, left, None
            another = self._started_without(left)
            seconds = time.monotonic() - began
            self._meter.changed(began)
            self._losses.append(
                RankLoss(
                    reason=str(error),
                    ranks=error.lost,
                    before=str(before.plan),
                    after=str(left.plan),
                    kept=len(live) - restarted,
                    restarted=restarted,
                    seconds=seconds,
                )
            )
            if another is None:
                return
            error = another

    def _recover(self, error: WorkerError) -> None:
        """Go on from what went wrong when the last run was given up."""
        self._lost, self._broken = None, True
        self._go_on_without(error)
        self._broken = False

    def _started_without(self, left: Deployment) -> WorkerError | None:
        """Change over to `left`; returns the error if a rank of it fails meanwhile."""
        try:
            self._change(left)
        except WorkerError as another:
            return another
        return None

    def _change(self, deployment: Deployment) -> None:
        """Start the ranks of `deployment` instead of the present ones, and go on with them."""
        assert self._start is not None
        began = time.monotonic()
        self._up = False
        self._start(deployment)
        self._up = True
        self._change_seconds = time.monotonic() - began
        self._deployment = deployment
        self._scheduler.reconfigure(deployment.scheduler, create_policy(deployment.scheduler))
        self._meter.separate, self._meter.mode = deployment.plan.separate, deployment.memory.mode
        self._meter.targets = _layouts(deployment)

    # ---- statistics ---------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Where the engine stands. May be called from another thread while `run` is iterated."""
        scheduler, memory, meter = self._scheduler, self._deployment.memory, self._meter
        counters = scheduler.counters
        block = self._deployment.spec.kv_bytes_per_token(self._deployment.dtype) * scheduler.config.block_size
        return EngineStats(
            plan=str(self._deployment.plan) if self._up else "auto",
            phase=meter.activity if scheduler.unfinished else "idle",
            requests_waiting=len(scheduler.waiting),
            requests_running=sum(replica.resident for replica in scheduler.replicas),
            requests_finished=self._finished,
            requests_failed=self._failed,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            elapsed_seconds=time.monotonic() - self._started,
            seconds_per_phase=dict(meter.seconds),
            host_seconds=dict(meter.host_seconds),
            rank_host_seconds=dict(meter.rank_host_seconds),
            steps=dict(meter.steps),
            phase_tokens=dict(meter.tokens),
            phase_sampled=dict(meter.sampled),
            phase_stepped=dict(meter.stepped),
            phase_keys=dict(meter.keys),
            phase_keys_read=dict(meter.keys_read),
            wall_seconds=dict(meter.wall_seconds),
            start_seconds=self._start_seconds,
            transitions=tuple(meter.transitions),
            rank_losses=tuple(self._losses),
            swapped_out_bytes=meter.swapped_out_bytes,
            swapped_in_bytes=meter.swapped_in_bytes,
            preemptions_swapped=counters.swapped_out,
            preemptions_recomputed=counters.recomputed,
            device_memory_peak_bytes=tuple(
                w + s + p for w, s, p in zip(memory.weights, memory.workspace, memory.pool, strict=True)
            ),
            device_memory_budget_bytes=self._deployment.device_memory,
            host_kv_peak_bytes=scheduler.host.peak * block,
            host_kv_budget_bytes=self._deployment.host_kv,
            host_kv_used_bytes=scheduler.host.used * block,
            device_kv_used_bytes=sum(replica.pool.used for replica in scheduler.replicas) * block,
            device_kv_pool_bytes=sum(replica.pool.total for replica in scheduler.replicas) * block,
        )

    def history(self) -> History:
        """How the engine came to where it stands. May be called from another thread, like `stats`."""
        return self._meter.history()


def _layouts(deployment: Deployment) -> tuple[str, ...]:
    return tuple(str(sharding.layout) for sharding in deployment.shardings)
