"""Policies for plans whose phases are separated in time (`P4->T4`, `P2->P2`).

Prefill fills the host buffer, decode drains it. The three differ only in when they turn:

- `seesaw` prefills until the host buffer is full and decodes until it is empty and the batch has thinned
  out so far that turning back costs less than going on: fewest transitions.
- `prefill-first` prefills whenever a prompt would fit beside the running sequences: the fullest decode batch
  and the most transitions.
- `decode-first` prefills one device's worth of prompts and decodes until none of them is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from seesaw.core.actions import DECODE, PREFILL
from seesaw.scheduling.config import PolicyName
from seesaw.scheduling.policies.base import deal, feed_prompt, feed_running, onboard
from seesaw.scheduling.sequence import Sequence, Status

if TYPE_CHECKING:
    from seesaw.scheduling.batch import BatchBuilder
    from seesaw.scheduling.replica import Replica
    from seesaw.scheduling.scheduler import Scheduler

_LOOK_AHEAD = 256
"""Waiting prompts that are looked at for whether they fill the host buffer."""


class PhasedPolicy:
    """Prefill in one phase, decode in the other; every prefilled sequence passes through the host buffer."""

    def __init__(self, name: PolicyName) -> None:
        self.name = name
        self._partial: dict[int, Sequence] = {}
        """The prompt of which some chunks are still to be fed, by replica."""
        self._largest_batch = 0
        """Most sequences resident at once in this decode phase."""

    def schedule(self, scheduler: Scheduler) -> None:
        """Drive the current phase, and turn when its work is done."""
        if scheduler.phase == PREFILL:
            self._prefill(scheduler)
            if not self._prefill_is_over(scheduler):
                return
            scheduler.transition(DECODE)
            self._largest_batch = 0
        self._decode(scheduler)
        if self._decode_is_over(scheduler):
            scheduler.park_all()
            scheduler.transition(PREFILL)
            self._prefill(scheduler)

    def turns_back(self, scheduler: Scheduler) -> bool:
        """Whether `schedule` would go over from decode to prefill now."""
        return scheduler.phase == DECODE and self._decode_is_over(scheduler)

    # ---- prefill ------------------------------------------------------------------------------------------

    def _prefill(self, scheduler: Scheduler) -> None:
        progress = True
        while progress:
            progress = False
            for replica in sorted(scheduler.replicas, key=lambda r: (r.tokens_in_flight, r.index)):
                limit = len(replica.groups) + 1 if scheduler.config.overlap else 1
                if replica.in_flight < limit:
                    progress = self._prefill_batch(scheduler, replica) or progress

    def _prefill_batch(self, scheduler: Scheduler, replica: Replica) -> bool:
        batch = scheduler.batch(replica, 0, feedback=False)
        share, most = self._fair_share(scheduler, replica), scheduler.config.max_running
        self._feed(scheduler, batch, self._partial.pop(replica.index, None))
        while (
            batch.tokens_fed < share and len(batch.sequences) < most and self._can_prefill(scheduler, replica)
        ):
            sequence = scheduler.waiting[0]
            scheduler.admit(sequence, replica, batch.group, via_host=_needs_decode(sequence))
            self._feed(scheduler, batch, sequence)
        scheduler.submit(batch)
        return bool(batch.sequences)

    def _feed(self, scheduler: Scheduler, batch: BatchBuilder, sequence: Sequence | None) -> None:
        if sequence is None or sequence.status is not Status.PREFILLING:
            return  # ended meanwhile
        feed_prompt(scheduler, batch, sequence, scheduler.config.max_batch_tokens - batch.tokens_fed)
        if sequence.status is Status.PREFILLING and sequence.cached < len(sequence.tokens):
            self._partial[batch.replica.index] = sequence

    def _can_prefill(self, scheduler: Scheduler, replica: Replica) -> bool:
        if not scheduler.waiting or self._target_reached(scheduler):
            return False
        sequence = scheduler.waiting[0]
        if _needs_decode(sequence) and scheduler.config.blocks(len(sequence.tokens)) > scheduler.host.free:
            return False
        return scheduler.has_room(replica, len(sequence.tokens), reserved=0)

    def _fair_share(self, scheduler: Scheduler, replica: Replica) -> int:
        """Tokens of prompts for the replica's next batch: a full one, unless so few are left that some replica would
        do without. Then all are to end at about the same time, each with what it has in hand."""
        most, replicas = scheduler.config.max_batch_tokens, len(scheduler.replicas)
        if replicas == 1 or scheduler.more_expected:
            return most
        in_hand = [r.tokens_in_flight for r in scheduler.replicas]
        for index, sequence in self._partial.items():
            in_hand[index] += len(sequence.tokens) - sequence.cached
        coming, enough = 0, replicas * (most + max(in_hand))
        for sequence in scheduler.waiting:
            if coming >= enough:
                break
            coming += len(sequence.tokens)
        return min(most, _level(in_hand, coming) - replica.tokens_in_flight)

    def _target_reached(self, scheduler: Scheduler) -> bool:
        """`seesaw` fills the host buffer; the others stop at what the decode devices can hold."""
        if self.name == "seesaw":
            return False
        config, replicas = scheduler.config, scheduler.config.plan.decode.dp
        prefilled = len(scheduler.hosted) + scheduler.swapping_out + len(self._partial)
        if prefilled >= config.max_running * replicas:
            return True
        next_blocks = config.blocks(len(scheduler.waiting[0].tokens)) + prefilled
        return prefilled > 0 and scheduler.host.used + next_blocks > config.device_blocks[DECODE] * replicas

    def _prefill_is_over(self, scheduler: Scheduler) -> bool:
        live = [s for s in self._partial.values() if s.status is Status.PREFILLING]
        if live or not (scheduler.hosted or scheduler.swapping_out):
            return False
        if not scheduler.waiting:
            return not scheduler.more_expected
        blocks = scheduler.config.blocks(len(scheduler.waiting[0].tokens))
        return blocks > scheduler.host.free or self._target_reached(scheduler)

    # ---- decode -------------------------------------------------------------------------------------------

    def _decode(self, scheduler: Scheduler) -> None:
        onboard(scheduler)
        deal(scheduler, partial(self._step, scheduler))
        resident = 0
        for replica in scheduler.replicas:
            resident += replica.resident
        self._largest_batch = max(self._largest_batch, resident)

    def _step(self, scheduler: Scheduler, replica: Replica, group: int) -> bool:
        batch = scheduler.batch(replica, group, feedback=scheduler.config.overlap)
        feed_running(scheduler, batch)
        scheduler.submit(batch)
        return bool(batch.sequences)

    def _decode_is_over(self, scheduler: Scheduler) -> bool:
        if scheduler.hosted or scheduler.swapping_out or not scheduler.waiting:
            return False
        if not any(replica.resident for replica in scheduler.replicas):
            return True
        residents = [s for r in scheduler.replicas for g in r.groups for s in g.sequences.values()]
        if self.name == "decode-first" or any(s.status is not Status.RUNNING for s in residents):
            return False
        parked = sum(scheduler.config.blocks(s.cached) for s in residents)
        prompt = len(scheduler.waiting[0].tokens)
        if parked + scheduler.config.blocks(prompt) > scheduler.host.free:
            return False
        if self.name == "prefill-first":
            return any(
                scheduler.has_room(r, prompt, reserved=scheduler.reserve(r)) for r in scheduler.replicas
            )
        return len(residents) <= self._thin(scheduler, len(residents), parked) * self._largest_batch

    def _thin(self, scheduler: Scheduler, residents: int, parked: int) -> float:
        """The share of the largest batch from which on it pays to turn back, with `parked` blocks swapped out.

        A step with r of B sequences does r tokens that a full step would do in r/B of the time, so that it wastes
        `step * (1 - r/B)`. Turning now instead makes r sequences wait on the host, where they cost a swap and
        their share of what else the next round could take in, that is, of a turn: with p of H blocks parked, one
        more makes 1 / (H - p) more rounds. A step of going on lets r / (mean output) of them end and saves their
        part. Both are equal at the share returned.
        """
        config, costs = scheduler.config, scheduler.config.turn_costs
        if costs is None:
            return config.refill_threshold
        coming = sum(config.blocks(len(s.tokens)) for s in islice(scheduler.waiting, _LOOK_AHEAD))
        if len(scheduler.waiting) > _LOOK_AHEAD or scheduler.more_expected:
            coming = config.host_blocks
        left = max(1, config.host_blocks - parked)
        crowding = costs.turn / left if coming > left else 0.0
        each = (crowding + costs.block) * parked / residents
        lasting = max(scheduler.counters.mean_output, 1)
        return 1 / (1 + self._largest_batch * each / (lasting * costs.step))


def _needs_decode(sequence: Sequence) -> bool:
    """Whether more than the one token that prefill samples may be generated."""
    return len(sequence.tokens) + 1 < sequence.limit


def _level(in_hand: Iterable[int], coming: int) -> int:
    """What those have who get some of what is `coming`, if it goes to those who have least, as evenly as may be."""
    heights, total = sorted(in_hand), coming
    for count, height in enumerate(heights, 1):
        total += height
        if count == len(heights) or total <= count * heights[count]:
            return -(-total // count)
    raise AssertionError("nobody to give it to")
