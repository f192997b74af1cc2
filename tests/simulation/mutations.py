"""Schedulers and engines that are broken on purpose, each in one place, and what must catch them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from msgspec.structs import replace as changed

from seesaw import elastic, engine
from seesaw.core.actions import SamplingState
from seesaw.core.errors import WorkerError
from seesaw.deployment import Deployment
from seesaw.engine import Engine
from seesaw.scheduling import batch
from seesaw.scheduling.batch import BatchBuilder, Flight
from seesaw.scheduling.blocks import BlockPool
from seesaw.scheduling.policies import base, mixed, phased
from seesaw.scheduling.replica import Replica
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence, Status

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutation:
    """A way to break the engine. `caught_by` names the invariant that is there to notice it; others may as well."""

    name: str
    caught_by: str
    apply: Callable[[Patch], None]


MUTATIONS: list[Mutation] = []


def mutation(caught_by: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register a mutation, named as its function."""

    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTATIONS.append(Mutation(apply.__name__, caught_by, apply))
        return apply

    return register


def _after(patch: Patch, owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Have `then` follow a method: it gets the result, and the arguments."""
    whole = getattr(owner, name)

    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        return then(whole(self, *args, **kwargs), self, *args, **kwargs)

    patch.setattr(owner, name, both)


# ---- losses ----------------------------------------------------------------------------------------------------


def _losing(
    patch: Patch, before: Callable[[Scheduler], Any], after: Callable[[Scheduler, Any], None]
) -> None:
    whole = Scheduler.lose_devices

    def lose_devices(self: Scheduler) -> int:
        seen = before(self)
        restarted = whole(self)
        after(self, seen)
        return restarted

    patch.setattr(Scheduler, "lose_devices", lose_devices)


@mutation("kept")
def what_leaves_for_the_host_counts_as_there(patch: Patch) -> None:
    def leaving(self: Scheduler) -> list[tuple[Sequence, list[int], int]]:
        return [
            (s, list(s.host_blocks), s.cached)
            for s in self._sequences.values()
            if s.status is Status.SWAPPING_OUT and not s.forwarded
        ]

    def keep(self: Scheduler, seen: list[tuple[Sequence, list[int], int]]) -> None:
        for sequence, blocks, cached in seen:
            self.waiting.remove(sequence)
            for block in blocks:
                self.host._free.remove(block)
            sequence.host_blocks, sequence.cached, sequence.status = blocks, cached, Status.HOST
            self.hosted.append(sequence)

    _losing(patch, leaving, keep)


@mutation("books")
def host_blocks_are_not_given_back_at_a_loss(patch: Patch) -> None:
    def release(self: Scheduler, sequence: Sequence) -> None:
        if sequence.home is not None or sequence.status is Status.HOST or not sequence.host_blocks:
            self.host.release(sequence.host_blocks)
        sequence.host_blocks, sequence.written_through = [], 0

    whole = Scheduler.lose_devices

    def lose_devices(self: Scheduler) -> int:
        self._release_host = lambda s: release(self, s)  # type: ignore[method-assign]
        try:
            return whole(self)
        finally:
            del self._release_host

    patch.setattr(Scheduler, "lose_devices", lose_devices)


@mutation("no crash")
def copies_stay_outstanding_at_a_loss(patch: Patch) -> None:
    _losing(patch, lambda s: dict(s._copies), lambda s, copies: s._copies.update(copies))


@mutation("books")
def copies_of_a_sequence_stay_counted_at_a_loss(patch: Patch) -> None:
    def off_device(self: Sequence) -> None:
        copies = self.copies
        whole(self)
        self.copies = copies

    whole = Sequence.off_device
    patch.setattr(Sequence, "off_device", off_device)


@mutation("kept")
def lost_sequences_go_on_where_they_stood(patch: Patch) -> None:
    def note(self: Scheduler) -> list[tuple[Sequence, int]]:
        return [(s, min(s.cached, len(s.tokens) - 1)) for s in self.live() if s.status is Status.RUNNING]

    def restore(_: Scheduler, seen: list[tuple[Sequence, int]]) -> None:
        for sequence, cached in seen:
            sequence.cached = cached

    _losing(patch, note, restore)


@mutation("kept")
def a_generated_token_is_lost(patch: Patch) -> None:
    def drop(self: Scheduler, _: object) -> None:
        for sequence in self.waiting:
            if sequence.generated:
                sequence.tokens.pop()
                del sequence.logprobs[-1:]

    _losing(patch, lambda s: None, drop)


@mutation("kept")
def what_is_on_the_host_is_computed_again(patch: Patch) -> None:
    def restart(self: Scheduler, _: object) -> None:
        while self.hosted:
            sequence = self.hosted.pop()
            self._release_host(sequence)
            sequence.cached, sequence.status = 0, Status.WAITING
            self.waiting.appendleft(sequence)

    _losing(patch, lambda s: None, restart)


@mutation("order")
def what_is_on_the_host_is_mixed_up_at_a_loss(patch: Patch) -> None:
    _losing(patch, lambda s: None, lambda s, _: s.hosted.reverse())


@mutation("order")
def what_is_computed_again_comes_last(patch: Patch) -> None:
    _losing(patch, lambda s: len(s.waiting), lambda s, before: s.waiting.rotate(before))


@mutation("recovery")
def a_neighbour_counts_as_lost(patch: Patch) -> None:
    whole = elastic.without

    def without(deployment: Deployment, error: WorkerError, *, longest: int) -> Deployment:
        others = [rank for rank in range(deployment.plan.world) if rank not in error.lost]
        more = (*error.lost, *others[:1])
        return whole(
            deployment,
            WorkerError(str(error), rank=error.rank, phase=error.phase, lost=more),
            longest=longest,
        )

    patch.setattr(engine, "without", without)


@mutation("recovery")
def the_lost_rank_is_started_again(patch: Patch) -> None:
    whole = elastic.without

    def without(deployment: Deployment, error: WorkerError, *, longest: int) -> Deployment:
        left = whole(deployment, error, longest=longest)
        return replace(left, places=deployment.places[: left.plan.world])

    patch.setattr(engine, "without", without)


@mutation("recovery")
def a_second_loss_while_starting_ends_the_job(patch: Patch) -> None:
    whole = Engine._change

    def change(self: Engine, deployment: Deployment) -> None:
        try:
            whole(self, deployment)
        except WorkerError as error:
            error.lost = ()
            raise

    patch.setattr(Engine, "_change", change)


@mutation("no crash")
def log_probabilities_are_forgotten_at_a_loss(patch: Patch) -> None:
    def forget(self: Scheduler, _: object) -> None:
        for sequence in self.waiting:
            sequence.logprobs.clear()

    _losing(patch, lambda s: None, forget)


@mutation("tokens")
def log_probabilities_are_mixed_up_at_a_loss(patch: Patch) -> None:
    def turn(self: Scheduler, _: object) -> None:
        for sequence in self.waiting:
            sequence.logprobs.reverse()

    _losing(patch, lambda s: None, turn)


@mutation("tokens")
def texts_are_forgotten_at_a_loss(patch: Patch) -> None:
    whole = Engine._go_on_without

    def go_on_without(self: Engine, error: WorkerError) -> None:
        whole(self, error)
        self._texts.clear()

    patch.setattr(Engine, "_go_on_without", go_on_without)


@mutation("recovery")
def statistics_forget_what_a_second_loss_interrupts(patch: Patch) -> None:
    whole = Engine._started_without

    def started_without(self: Engine, left: Deployment) -> WorkerError | None:
        another = whole(self, left)
        if another is not None:
            self._losses.clear()
        return another

    patch.setattr(Engine, "_started_without", started_without)


@mutation("recovery")
def a_loss_while_a_run_is_given_up_ends_the_job(patch: Patch) -> None:
    def recover(self: Engine, error: WorkerError) -> None:
        self._broken = True
        raise error

    patch.setattr(Engine, "_recover", recover)


@mutation("recovery")
def context_is_given_up_for_ranks(patch: Patch) -> None:
    whole = elastic.without

    def without(deployment: Deployment, error: WorkerError, *, longest: int) -> Deployment:
        memory = replace(deployment.memory, max_model_len=longest)
        shrunk = replace(deployment, setup=replace(deployment.setup, memory=memory))
        return whole(shrunk, error, longest=longest)

    patch.setattr(engine, "without", without)


@mutation("stops")
def the_job_goes_on_where_it_was_to_stop(patch: Patch) -> None:
    whole = Engine._go_on_without

    def go_on_without(self: Engine, error: WorkerError) -> None:
        deployment = self._deployment
        options = replace(deployment.options, on_rank_loss="continue")
        self._deployment = replace(deployment, options=options)
        whole(self, error)

    patch.setattr(Engine, "_go_on_without", go_on_without)


# ---- copies and blocks -----------------------------------------------------------------------------------------


@mutation("tokens")
def a_block_in_part_is_not_written_through(patch: Patch) -> None:
    whole = BatchBuilder.write_through

    def write_through(self: BatchBuilder, sequence: Sequence, blocks: int) -> None:
        size = sequence.capacity // max(len(sequence.device_blocks), 1)
        whole(self, sequence, min(blocks, sequence.cached // size))

    patch.setattr(BatchBuilder, "write_through", write_through)


@mutation("in flight")
def blocks_are_freed_while_a_copy_is_in_flight(patch: Patch) -> None:
    patch.setattr(Sequence, "idle", property(lambda self: not self.forwarded))


@mutation("in flight")
def blocks_are_freed_while_a_forward_is_in_flight(patch: Patch) -> None:
    patch.setattr(Sequence, "idle", property(lambda self: self.copies == 0))


@mutation("in flight")
def a_swap_in_gives_its_host_blocks_back_at_once(patch: Patch) -> None:
    def after(result: None, self: Scheduler, sequence: Sequence, replica: Replica) -> None:
        self._release_host(sequence)

    _after(patch, Scheduler, "swap_in", after)


@mutation("in flight")
def decoding_does_not_wait_for_the_swap_in(patch: Patch) -> None:
    def after(result: None, self: Scheduler, sequence: Sequence, replica: Replica) -> None:
        self._decode(sequence)

    _after(patch, Scheduler, "swap_in", after)


@mutation("books")
def host_blocks_leak_when_a_sequence_ends(patch: Patch) -> None:
    whole = Scheduler._release_host

    def release(self: Scheduler, sequence: Sequence) -> None:
        if sequence.status is not Status.FINISHED:
            whole(self, sequence)

    patch.setattr(Scheduler, "_release_host", release)


@mutation("budgets")
def a_pool_has_a_block_too_many(patch: Patch) -> None:
    whole = BlockPool.__init__
    patch.setattr(BlockPool, "__init__", lambda self, blocks: whole(self, blocks + 1))


@mutation("budgets")
def batches_are_larger_than_memory_was_set_aside_for(patch: Patch) -> None:
    whole = base.feed_prompt

    def feed_prompt(scheduler: Scheduler, batch: BatchBuilder, sequence: Sequence, room: int) -> None:
        whole(scheduler, batch, sequence, room + 8)

    patch.setattr(phased, "feed_prompt", feed_prompt)
    patch.setattr(mixed, "feed_prompt", feed_prompt)


@mutation("budgets")
def short_prompts_are_sampled_all_at_once(patch: Patch) -> None:
    whole = phased.PhasedPolicy._prefill_batch

    def prefill_batch(self: phased.PhasedPolicy, scheduler: Scheduler, replica: Replica) -> bool:
        config = scheduler.config
        scheduler.config = replace(config, max_running=64)
        try:
            return whole(self, scheduler, replica)
        finally:
            scheduler.config = config

    patch.setattr(phased.PhasedPolicy, "_prefill_batch", prefill_batch)


# ---- Forwards --------------------------------------------------------------------------------------------------


@mutation("feedback")
def feedback_is_not_waited_for(patch: Patch) -> None:
    def after(result: tuple[Any, ...], self: BatchBuilder) -> tuple[Any, ...]:
        return (changed(result[0], feedback_from=-1), *result[1:])

    _after(patch, BatchBuilder, "build", after)


@mutation("slots")
def a_slot_is_used_again_before_it_is_closed(patch: Patch) -> None:
    def drop_slot(self: Replica, slot: int) -> None:
        self.closing.append(slot)
        self._free_slots.append(slot)

    patch.setattr(Replica, "drop_slot", drop_slot)
    patch.setattr(Replica, "slots_closed", lambda self, count: self.closing.__delitem__(slice(count)))


@mutation("slots")
def slots_given_up_while_a_batch_is_made_are_closed_by_it(patch: Patch) -> None:
    def build(self: BatchBuilder) -> Any:
        self._closing = len(self.replica.closing)
        return whole(self)

    whole = BatchBuilder.build
    patch.setattr(BatchBuilder, "build", build)


@mutation("slots")
def slots_are_never_closed(patch: Patch) -> None:
    def after(result: None, self: BatchBuilder) -> None:
        self._closing = 0

    _after(patch, BatchBuilder, "__post_init__", after)


@mutation("one owner")
def ranks_are_told_the_blocks_of_another_sequence(patch: Patch) -> None:
    def tell_blocks(self: BatchBuilder, sequence: Sequence) -> None:
        opens = sequence.slot < 0
        whole(self, sequence)
        if opens and len(self._open) > 1:
            both = self._open[-2].blocks, self._open[-1].blocks
            self._open[-1].blocks[: len(both[0])] = both[0][: len(both[1])]

    whole = BatchBuilder._tell_blocks
    patch.setattr(BatchBuilder, "_tell_blocks", tell_blocks)


@mutation("feedback")
def sampled_tokens_are_not_handed_on(patch: Patch) -> None:
    def after(result: None, self: BatchBuilder) -> None:
        self.feedback = False

    _after(patch, BatchBuilder, "__post_init__", after)


@mutation("tokens")
def noise_begins_again_with_each_slot(patch: Patch) -> None:
    _states(patch, generated=0)


@mutation("tokens")
def penalties_forget_what_was_generated_before_a_slot(patch: Patch) -> None:
    _states(patch, output=[])


def _states(patch: Patch, **fields: Any) -> None:
    whole = batch.sampling_state

    def sampling_state(sequence: Sequence, engine_seed: int) -> SamplingState | None:
        state = whole(sequence, engine_seed)
        return None if state is None else changed(state, **fields)

    patch.setattr(batch, "sampling_state", sampling_state)


@mutation("tokens")
def tokens_of_ended_sequences_are_appended(patch: Patch) -> None:
    def append(self: Scheduler, flight: Flight, tokens: list[int]) -> list[Sequence]:
        for sequence, token in zip(flight.sampled, tokens, strict=True):
            if sequence.status is Status.FINISHED and not sequence.logprobs:
                sequence.tokens.append(token)
        return whole(self, flight, tokens)

    whole = Scheduler._append
    patch.setattr(Scheduler, "_append", append)


@mutation("same trace")
def what_is_next_is_left_to_chance(patch: Patch) -> None:
    dice = random.Random()

    def after(result: list[Sequence], self: Scheduler, *args: Any) -> list[Sequence]:
        if self.waiting and dice.random() < 0.5:
            self.waiting.rotate(1)
        return result

    _after(patch, Scheduler, "add", after)


# ---- who runs when ---------------------------------------------------------------------------------------------


@mutation("no deadlock")
def growth_is_not_reserved_and_nothing_parked(patch: Patch) -> None:
    patch.setattr(Scheduler, "reserve", lambda self, replica: 0)
    patch.setattr(base, "_park_youngest", lambda scheduler, replica: None)


@mutation("no deadlock")
def prefill_goes_on_when_the_host_buffer_is_full(patch: Patch) -> None:
    whole = phased.PhasedPolicy._prefill_is_over

    def prefill_is_over(self: phased.PhasedPolicy, scheduler: Scheduler) -> bool:
        return not scheduler.waiting and whole(self, scheduler)

    patch.setattr(phased.PhasedPolicy, "_prefill_is_over", prefill_is_over)


@mutation("no livelock")
def what_arrives_is_parked_at_once(patch: Patch) -> None:
    whole = Scheduler._settle

    def settle(self: Scheduler, sequence: Sequence) -> None:
        arrives = sequence.status is Status.SWAPPING_IN
        whole(self, sequence)
        if arrives and sequence.status is Status.RUNNING:
            self.park(sequence)

    patch.setattr(Scheduler, "_settle", settle)


# ---- the engine ------------------------------------------------------------------------------------------------


@mutation("once")
def a_row_is_answered_twice(patch: Patch) -> None:
    count = itertools.count()

    def after(result: None, self: Engine, sequence: Sequence) -> None:
        if self._done and next(count) % 7 == 6:
            self._done.append(self._done[-1])

    _after(patch, Engine, "_finish", after)


@mutation("once")
def a_row_is_forgotten(patch: Patch) -> None:
    def after(result: None, self: Engine, sequence: Sequence) -> None:
        if len(self._done) > 1:
            self._done.pop()

    _after(patch, Engine, "_finish", after)


@mutation("nothing remains")
def texts_of_rows_given_up_stay(patch: Patch) -> None:
    def give_up(self: Engine) -> None:
        texts = dict(self._texts)
        whole(self)
        self._texts.update(texts)

    whole = Engine._give_up
    patch.setattr(Engine, "_give_up", give_up)


@mutation("stops")
def a_broken_engine_serves_again(patch: Patch) -> None:
    patch.setattr(Engine, "_broken", property(lambda self: False, lambda self, value: None), raising=False)


@mutation("refusals")
def all_refusals_are_the_same(patch: Patch) -> None:
    def after(result: None, self: Engine, request: Any) -> None:
        for output in self._done:
            if output.error is not None:
                output.error.code = "invalid_request"

    _after(patch, Engine, "_add", after)


@mutation("nothing remains")
def rows_are_given_up_without_waiting_for_the_ranks(patch: Patch) -> None:
    patch.setattr(Engine, "_rest", lambda self: None)


@mutation("once")
def refused_rows_are_not_heard_of_again(patch: Patch) -> None:
    def after(result: None, self: Engine, request: Any) -> None:
        self._done[:] = [output for output in self._done if output.error is None]

    _after(patch, Engine, "_add", after)
