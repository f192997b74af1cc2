"""What every policy is, and the moves that policies share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from seesaw.scheduling.sequence import Sequence, Status

if TYPE_CHECKING:
    from seesaw.scheduling.batch import BatchBuilder
    from seesaw.scheduling.replica import Replica
    from seesaw.scheduling.scheduler import Scheduler


class Policy(Protocol):
    """Decides which moves of the scheduler are made now."""

    def schedule(self, scheduler: Scheduler) -> None:
        """Make moves until nothing more can be done before a completion comes in."""


def depth(scheduler: Scheduler) -> int:
    """Forwards that may be in flight per micro-batch group: one runs while the next waits on the workers."""
    return 2 if scheduler.config.overlap else 1


def may_submit(scheduler: Scheduler, replica: Replica, group: int) -> bool:
    """Whether one more Forward of this group may be put in flight."""
    if not scheduler.config.overlap and replica.in_flight:
        return False
    return replica.groups[group].in_flight < depth(scheduler)


def onboard(scheduler: Scheduler) -> None:
    """Swap in from the host buffer what the device pools have room for, beside the running computation."""
    if not scheduler.hosted:
        return
    reserved = [scheduler.reserve(replica) for replica in scheduler.replicas]
    while scheduler.hosted:
        sequence = scheduler.hosted[0]
        tokens = sequence.cached + 1
        roomy = [r for r in scheduler.replicas if scheduler.has_room(r, tokens, reserved=reserved[r.index])]
        if not roomy:
            return
        replica = min(roomy, key=lambda r: (r.resident, r.index))
        scheduler.swap_in(sequence, replica)
        reserved[replica.index] += 1


def fair_sizes(scheduler: Scheduler) -> list[int]:
    """How many sequences a group of each replica may have: as if all that wait and fit were spread evenly.

    Else the first group would take what the others could begin with, and a pipeline or another replica would
    wait for it from then on.
    """
    replicas = scheduler.replicas
    if not scheduler.waiting:
        return [0] * len(replicas)
    blocks = scheduler.config.blocks(len(scheduler.waiting[0].tokens) + 1) + 1
    room = [
        max(0, min((r.pool.free - scheduler.reserve(r)) // blocks, r.max_running - r.resident))
        for r in replicas
    ]
    roomy = [r for r in replicas if room[r.index]] or replicas
    coming = max(1, min(len(scheduler.waiting), sum(room)))
    level = -(-(sum(r.resident for r in roomy) + coming) // len(roomy))
    return [-(-min(level, r.resident + max(1, room[r.index])) // r.stages) for r in replicas]


def decodable(scheduler: Scheduler, replica: Replica, group: int) -> list[Sequence]:
    """Sequences of the group that can take a decode step now, each with a device block for it.

    When the pool is exhausted, the youngest residents are parked until enough blocks are on their way for
    the older ones; those that still lack a block sit this step out.
    """
    members = replica.groups[group].sequences.values()
    candidates = [s for s in members if s.status is Status.RUNNING and s.wants_token]
    if not scheduler.config.overlap:
        candidates = [s for s in candidates if s.pending == 0]
    ready, starved = [], 0
    for sequence in candidates:
        if sequence.status is not Status.RUNNING:
            continue  # parked for an older sequence in this very loop
        if scheduler.grow(sequence):
            ready.append(sequence)
            continue
        starved += 1
        if replica.leaving_blocks < starved:
            _park_youngest(scheduler, replica)
            if sequence.status is Status.RUNNING and scheduler.grow(sequence):
                ready.append(sequence)  # the victim was idle, so that its blocks are free at once
                starved -= 1
    return [s for s in ready if s.status is Status.RUNNING]


def _park_youngest(scheduler: Scheduler, replica: Replica) -> None:
    for victim in replica.youngest():
        if victim.status is Status.RUNNING:
            scheduler.park(victim)
            return


def feed_prompt(scheduler: Scheduler, batch: BatchBuilder, sequence: Sequence, room: int) -> None:
    """Feed the next chunk of a prompt, at most `room` tokens, with its write-through copies."""
    count = min(room, len(sequence.tokens) - sequence.cached)
    last = batch.feed(sequence, count)
    if sequence.host_blocks:
        whole = sequence.cached // scheduler.config.block_size
        batch.write_through(sequence, len(sequence.host_blocks) if last else whole)
    if last:
        scheduler.prefilled(sequence)
