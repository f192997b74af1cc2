"""`check_integrity`: the invariants of the scheduler's books, asserted in tests after every action."""

from __future__ import annotations

from collections import defaultdict

from seesaw.scheduling.replica import Replica
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence, Status

_ON_DEVICE = (Status.PREFILLING, Status.RUNNING, Status.SWAPPING_IN)


def check_integrity(scheduler: Scheduler) -> None:
    """Assert that no block leaks or is shared and that every sequence is where its status says."""
    sequences = list(scheduler._sequences.values())
    scheduler.host.check([block for s in sequences for block in s.host_blocks])
    owned: dict[Replica, list[int]] = defaultdict(list)
    for sequence in sequences:
        if sequence.home is not None:
            owned[sequence.home].extend(sequence.device_blocks)
        _check_sequence(scheduler, sequence)
    for replica in {*scheduler.replicas, *owned}:
        replica.pool.check(owned[replica])
        _check_residents(replica)
        _check_slots(replica)
    everywhere = [s.status for s in sequences]
    for queue, status in ((scheduler.waiting, Status.WAITING), (scheduler.hosted, Status.HOST)):
        assert all(s.status is status for s in queue)
        assert len(queue) == everywhere.count(status), f"a sequence {status} is not queued"
    assert scheduler.swapping_out == everywhere.count(Status.SWAPPING_OUT)


def _check_sequence(scheduler: Scheduler, sequence: Sequence) -> None:
    config, tokens, pending = scheduler.config, len(sequence.tokens), sequence.pending
    assert sequence.copies >= 0 and pending <= 2
    assert tokens <= sequence.limit <= config.max_model_len
    assert sequence.cached <= tokens + pending
    resident = sequence.home is not None and sequence.group >= 0
    assert resident == (sequence.status in _ON_DEVICE and not _left(sequence)), sequence.status
    assert sequence.untold or (sequence.slot >= 0) == (sequence.group >= 0)
    assert sequence.untold or sequence.known_blocks == len(sequence.device_blocks) or sequence.group < 0
    assert sequence.capacity == len(sequence.device_blocks) * config.block_size
    if resident:
        assert sequence.home is not None
        assert sequence.home.groups[sequence.group].sequences[sequence.id] is sequence
    if sequence.status in (Status.RUNNING, Status.PREFILLING) and resident:
        assert sequence.cached <= len(sequence.device_blocks) * config.block_size
    if sequence.status is Status.HOST:
        assert sequence.idle and sequence.home is None
        assert len(sequence.host_blocks) == config.blocks(sequence.cached)
    if sequence.status is Status.WAITING:
        assert not sequence.device_blocks and not sequence.host_blocks and sequence.idle


def _left(sequence: Sequence) -> bool:
    """Prefilled, wanting no token but the one in flight: it ends when that one comes back."""
    return sequence.status is Status.PREFILLING and sequence.group < 0 and sequence.forwarded


def _check_residents(replica: Replica) -> None:
    residents = [s for group in replica.groups for s in group.sequences.values()]
    assert replica.resident == len(residents)
    growth = sum(max(s.expected_blocks - len(s.device_blocks), 1) for s in residents)
    assert replica._growth == growth, "the growth of the residents is miscounted"
    for group in replica.groups:
        unfed = [s for s in group.sequences.values() if s.status is Status.PREFILLING]
        assert list(group.prefilling.values()) == unfed
        group.lockstep.check(list(group.sequences.values()))


def _check_slots(replica: Replica) -> None:
    slots = [s.slot for group in replica.groups for s in group.sequences.values() if s.slot >= 0]
    assert len(slots) == len(set(slots)), "two sequences share a slot"
    assert replica.resident <= replica.max_running
