"""Policies for static plans: one layout, no phases; a sequence decodes where it was prefilled.

- `chunked` fills each batch with all running sequences and a chunk of prompts: what vLLM does.
- `prefill-first` runs prompts alone whenever one fits, and decodes otherwise.
- `decode-first` fills the devices with prompts, then decodes until none is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seesaw.scheduling.config import PolicyName
from seesaw.scheduling.policies.base import decodable, feed_prompt, may_submit, onboard
from seesaw.scheduling.sequence import Sequence, Status

if TYPE_CHECKING:
    from seesaw.scheduling.batch import BatchBuilder
    from seesaw.scheduling.replica import Replica
    from seesaw.scheduling.scheduler import Scheduler


class MixedPolicy:
    """Batches of decode steps and prompt chunks under one layout."""

    def __init__(self, name: PolicyName) -> None:
        self.name = name

    def schedule(self, scheduler: Scheduler) -> None:
        """Bring preempted sequences back, then give every group its next batches."""
        onboard(scheduler)
        for replica in sorted(scheduler.replicas, key=lambda r: (r.resident, r.index)):
            for group in range(replica.stages):
                while may_submit(scheduler, replica, group):
                    batch = scheduler.batch(replica, group, feedback=scheduler.config.overlap)
                    self._fill(scheduler, replica, group, batch)
                    scheduler.submit(batch)
                    if not batch.sequences:
                        break

    def _fill(self, scheduler: Scheduler, replica: Replica, group: int, batch: BatchBuilder) -> None:
        if self.name == "chunked":
            self._decode(scheduler, replica, group, batch)
            self._prefill(scheduler, replica, group, batch)
        elif self.name == "prefill-first":
            self._prefill(scheduler, replica, group, batch)
            if not batch.sequences:
                self._decode(scheduler, replica, group, batch)
        else:
            self._fill_or_drain(scheduler, replica, group, batch)

    def _fill_or_drain(self, scheduler: Scheduler, replica: Replica, group: int, batch: BatchBuilder) -> None:
        if replica.resident == 0:
            replica.filling = True
        if replica.filling:
            self._prefill(scheduler, replica, group, batch)
            if batch.sequences or _partial(replica):
                return
            replica.filling = replica.resident == 0
        self._decode(scheduler, replica, group, batch)

    def _decode(self, scheduler: Scheduler, replica: Replica, group: int, batch: BatchBuilder) -> None:
        for sequence in decodable(scheduler, replica, group):
            batch.feed(sequence, 1)

    def _prefill(self, scheduler: Scheduler, replica: Replica, group: int, batch: BatchBuilder) -> None:
        budget = scheduler.config.max_batch_tokens
        for sequence in list(replica.groups[group].sequences.values()):
            if sequence.status is Status.PREFILLING and batch.tokens_fed < budget:
                feed_prompt(scheduler, batch, sequence, budget - batch.tokens_fed)
        if scheduler.hosted or scheduler.swapping_out:
            return  # preempted sequences come back before new ones are taken
        reserved = scheduler.reserve(replica) if scheduler.waiting else 0
        while batch.tokens_fed < budget and scheduler.waiting and replica.smallest_group() == group:
            sequence = scheduler.waiting[0]
            if not scheduler.has_room(replica, len(sequence.tokens) + 1, reserved=reserved):
                return
            scheduler.admit(sequence, replica, via_host=False)
            reserved += 1
            feed_prompt(scheduler, batch, sequence, budget - batch.tokens_fed)


def _partial(replica: Replica) -> list[Sequence]:
    everyone = (s for group in replica.groups for s in group.sequences.values())
    return [s for s in everyone if s.status is Status.PREFILLING]
