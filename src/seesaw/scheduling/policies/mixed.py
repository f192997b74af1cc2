"""Policies for static plans: one layout, no phases; a sequence decodes where it was prefilled.

- `chunked` fills each batch with all running sequences and a chunk of prompts: what vLLM does.
- `prefill-first` runs prompts alone whenever one fits, and decodes otherwise.
- `decode-first` fills the devices with prompts, then decodes until none is left.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from seesaw.scheduling.config import PolicyName
from seesaw.scheduling.policies.base import deal, fair_sizes, feed_prompt, feed_running, onboard

if TYPE_CHECKING:
    from seesaw.scheduling.batch import BatchBuilder
    from seesaw.scheduling.replica import Replica
    from seesaw.scheduling.scheduler import Scheduler


class MixedPolicy:
    """Batches of decode steps and prompt chunks under one layout."""

    def __init__(self, name: PolicyName) -> None:
        self.name = name

    def schedule(self, scheduler: Scheduler) -> None:
        """Bring preempted sequences back, then deal batches to the groups in turn until none can take one."""
        onboard(scheduler)
        deal(scheduler, partial(self._submit, scheduler))

    def _submit(self, scheduler: Scheduler, replica: Replica, group: int) -> bool:
        batch = scheduler.batch(replica, group, feedback=scheduler.config.overlap)
        self._fill(scheduler, batch, fair_sizes(scheduler)[replica.index])
        scheduler.submit(batch)
        return bool(batch.sequences)

    def _fill(self, scheduler: Scheduler, batch: BatchBuilder, limit: int) -> None:
        if self.name == "chunked":
            feed_running(scheduler, batch)
            self._prefill(scheduler, batch, limit)
        elif self.name == "prefill-first":
            self._prefill(scheduler, batch, limit)
            if not batch.sequences:
                feed_running(scheduler, batch)
        else:
            self._fill_or_drain(scheduler, batch, limit)

    def _fill_or_drain(self, scheduler: Scheduler, batch: BatchBuilder, limit: int) -> None:
        replica = batch.replica
        if replica.resident == 0:
            replica.filling = True
        if replica.filling:
            self._prefill(scheduler, batch, limit)
            full = len(replica.groups[batch.group].sequences) >= limit
            if (
                batch.sequences
                or any(group.prefilling for group in replica.groups)
                or (full and replica.in_flight)
            ):
                return  # another group may have its share to take yet
            replica.filling = replica.resident == 0
        feed_running(scheduler, batch)

    def _prefill(self, scheduler: Scheduler, batch: BatchBuilder, limit: int) -> None:
        """Feed prompts that have begun, then new ones while the group has fewer than `limit` sequences."""
        budget, replica = scheduler.config.max_batch_tokens, batch.replica
        group = replica.groups[batch.group]
        members = group.sequences
        for sequence in list(group.prefilling.values()):
            if batch.tokens_fed < budget:
                feed_prompt(scheduler, batch, sequence, budget - batch.tokens_fed)
        if scheduler.hosted or scheduler.swapping_out:
            return  # preempted sequences come back before new ones are taken
        if not scheduler.waiting or len(members) >= limit:
            return
        reserved = scheduler.reserve(replica)
        while batch.tokens_fed < budget and scheduler.waiting and len(members) < limit:
            sequence = scheduler.waiting[0]
            tokens = min(len(sequence.tokens) + 1, sequence.limit)
            if not scheduler.has_room(replica, tokens, reserved=reserved):
                return
            scheduler.admit(sequence, replica, batch.group, via_host=False)
            reserved += 1
            feed_prompt(scheduler, batch, sequence, budget - batch.tokens_fed)
