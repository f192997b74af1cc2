"""`Replica`: the scheduler's picture of one copy of the model under one layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from seesaw.scheduling.blocks import BlockPool
from seesaw.scheduling.lockstep import Lockstep
from seesaw.scheduling.sequence import Sequence


@dataclass(slots=True)
class Group:
    """A pipeline micro-batch: sequences that step together. Under PP several groups fill the pipeline."""

    sequences: dict[int, Sequence] = field(default_factory=dict)
    """Resident sequences by id, oldest admission first."""
    prefilling: dict[int, Sequence] = field(default_factory=dict)
    """Those of which tokens of the prompt are still to be fed."""
    lockstep: Lockstep = field(default_factory=Lockstep)
    """Those that decode."""
    in_flight: int = 0
    """Forwards of this group in flight."""


class Replica:
    """Device pool, slots and micro-batch groups of one replica.

    A transition to another layout makes new replicas; an old one lives on until its last Forward and copy
    have come back, so that late completions find the pool their blocks belong to.
    """

    def __init__(self, *, index: int, blocks: int, block_size: int, groups: int, max_running: int) -> None:
        self.index = index
        self.pool = BlockPool(blocks)
        self.groups = [Group() for _ in range(groups)]
        self.max_running = max_running
        self.resident = 0
        """Sequences that hold a place."""
        self.in_flight = 0
        """Forwards in flight."""
        self.tokens_in_flight = 0
        """Tokens that they feed."""
        self.latest_group = len(self.groups) - 1
        """Whose Forward was submitted last; the group behind it is next (`policies.base.deal`)."""
        self.completed = -1
        """Id of the latest Forward that has come back."""
        self.departures = 0
        """Times that a place or blocks were given up."""
        self.refused: tuple[int, int, int] | None = None
        """What was asked when a sequence of the host buffer was last refused (`policies.base.onboard`)."""
        self.leaving_blocks = 0
        """Device blocks of sequences that have left and are not idle yet: free soon."""
        self.filling = True
        """Policy `decode-first` under a static plan: whether a new batch is being prefilled."""
        self.closing: list[int] = []
        """Slots given up since the last Forward; the next one tells the workers."""
        self._block_size = block_size
        self._free_slots: list[int] = []
        self._slots = 0
        self._growth = 0
        self._growth_mean = -1

    # ---- residents ----------------------------------------------------------------------------------------

    def join(self, sequence: Sequence, group: int, blocks: int) -> None:
        """Take `sequence` into micro-batch `group`, with so many blocks."""
        sequence.device_blocks = self.pool.allocate(blocks)
        sequence.capacity = blocks * self._block_size
        sequence.known_blocks = 0
        sequence.untold = True
        sequence.arrive(self, group)
        self._growth += self._expect(sequence)
        self.groups[group].sequences[sequence.id] = sequence
        self.resident += 1

    def leave(self, sequence: Sequence) -> None:
        """The sequence gives up place and slot; its blocks stay its own until `release`."""
        group = self.groups[sequence.group]
        del group.sequences[sequence.id]
        group.prefilling.pop(sequence.id, None)
        if sequence.lockstep is not None:
            group.lockstep.remove(sequence)
        sequence.group = -1
        self.resident -= 1
        self.departures += 1
        self._growth -= _growth(sequence)
        self.leaving_blocks += len(sequence.device_blocks)
        if sequence.slot >= 0:
            self.drop_slot(sequence.slot)
            sequence.slot = -1

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence that has left."""
        assert sequence.group < 0
        self.leaving_blocks -= len(sequence.device_blocks)
        self.departures += 1
        self.pool.release(sequence.device_blocks)
        sequence.device_blocks, sequence.capacity, sequence.home = [], 0, None

    def grow(self, sequence: Sequence) -> bool:
        """Give a resident one more block; False if none is free."""
        block = self.pool.take()
        if block is None:
            return False
        if sequence.expected_blocks - len(sequence.device_blocks) > 1:
            self._growth -= 1  # else one more is expected as before
        sequence.device_blocks.append(block)
        sequence.capacity += self._block_size
        sequence.untold = True
        return True

    def growth(self, mean_output: int) -> int:
        """Blocks that the residents are expected to grow by, one each at least, where sequences generate
        `mean_output` tokens on average. Kept up to date as they come, go and grow."""
        if mean_output != self._growth_mean:
            self._growth_mean = mean_output
            self._growth = 0
            for group in self.groups:
                for sequence in group.sequences.values():
                    self._growth += self._expect(sequence)
        return self._growth

    def _expect(self, sequence: Sequence) -> int:
        """Note how many blocks it is expected to need in the end; returns by how many it is to grow."""
        reach = sequence.prompt_tokens + self._growth_mean
        if reach > sequence.limit:
            reach = sequence.limit
        sequence.expected_blocks = expected = -(-reach // self._block_size)
        more = expected - len(sequence.device_blocks)
        return more if more > 1 else 1

    # ---- slots --------------------------------------------------------------------------------------------

    def take_slot(self) -> int:
        """A slot number that no other resident sequence has."""
        if self._free_slots:
            return self._free_slots.pop()
        self._slots += 1
        return self._slots - 1

    def drop_slot(self, slot: int) -> None:
        """Give a slot up; it can be taken again once a Forward has told the workers."""
        self.closing.append(slot)

    def slots_closed(self, count: int) -> None:
        """The first `count` slots of `closing` are in a Forward now."""
        self._free_slots.extend(self.closing[:count])
        del self.closing[:count]

    def smallest_group(self) -> int:
        """Index of the group with the fewest sequences."""
        return min(range(len(self.groups)), key=lambda g: len(self.groups[g].sequences))

    def youngest(self) -> list[Sequence]:
        """Resident sequences, the latest admission first."""
        everyone = [s for group in self.groups for s in group.sequences.values()]
        return sorted(everyone, key=lambda s: -s.admitted)


def _growth(sequence: Sequence) -> int:
    return max(sequence.expected_blocks - len(sequence.device_blocks), 1)
