"""What every policy is, and the moves that policies share."""

from __future__ import annotations

from collections.abc import Callable
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


def deal(scheduler: Scheduler, submit: Callable[[Replica, int], bool]) -> None:
    """Let the groups of all replicas submit Forwards in turn, until none can. `submit` says whether it did."""
    active = list(scheduler.replicas)
    while active:
        active.sort(key=lambda replica: (replica.in_flight, replica.resident, replica.index))
        active = [replica for replica in active if _deal_one(scheduler, replica, submit)]


def _deal_one(scheduler: Scheduler, replica: Replica, submit: Callable[[Replica, int], bool]) -> bool:
    """Submit a Forward of the group whose turn it is; groups that have nothing to feed are passed over.

    A group that may not submit yet is waited for: one that came before its turn would stand in the first stage until
    its last Forward is through the last one, and hold up all that are behind it, as long as that order lasts.
    """
    if not scheduler.config.overlap and replica.in_flight:
        return False
    count = len(replica.groups)
    for step in range(1, count + 1):
        group = (replica.latest_group + step) % count
        if replica.groups[group].in_flight >= depth(scheduler):
            return False
        if submit(replica, group):
            replica.latest_group = group
            return True
    return False


def onboard(scheduler: Scheduler) -> None:
    """Swap in from the host buffer what the device pools have room for, beside the running computation."""
    while scheduler.hosted:
        sequence = scheduler.hosted[0]
        roomy = [replica for replica in scheduler.replicas if _takes(scheduler, replica, sequence)]
        if not roomy:
            return
        scheduler.swap_in(sequence, min(roomy, key=lambda r: (r.resident, r.index)))


def _takes(scheduler: Scheduler, replica: Replica, sequence: Sequence) -> bool:
    """Whether the replica has room for a sequence of the host buffer beside the growth of its residents.

    A refusal holds until something leaves: what is free and what is reserved shrink together.
    """
    if replica.resident >= replica.max_running:
        return False
    asked = sequence.id, replica.departures, scheduler.counters.mean_output
    if replica.refused == asked:
        return False
    if scheduler.has_room(replica, sequence.cached + 1, reserved=scheduler.reserve(replica)):
        return True
    replica.refused = asked
    return False


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
    return [-(-min(level, r.resident + max(1, room[r.index])) // len(r.groups)) for r in replicas]


def feed_running(scheduler: Scheduler, batch: BatchBuilder) -> None:
    """Feed a decode step of every sequence of the batch's group that can take one now."""
    group = batch.replica.groups[batch.group]
    lockstep = group.lockstep
    due = lockstep.due()
    last = lockstep.prepare(due, batch.replica.grow)
    if last is None:
        batch.feed_some(_with_room(scheduler, batch.replica, lockstep.dissolve()))
        lockstep.start_over(list(group.sequences.values()), batch.id)
    elif lockstep.members:
        batch.feed_all(lockstep, due, last)
        lockstep.stepped(batch.id, last)


def _with_room(scheduler: Scheduler, replica: Replica, candidates: list[Sequence]) -> list[Sequence]:
    """Those of the candidates that have a device block for their next token.

    When the pool is exhausted, the youngest residents are parked until enough blocks are on their way for
    the older ones; those that still lack a block sit this step out.
    """
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
