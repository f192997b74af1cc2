"""`Replica`: the scheduler's picture of one copy of the model under one layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from seesaw.scheduling.blocks import BlockPool
from seesaw.scheduling.sequence import Sequence


@dataclass(slots=True)
class Group:
    """A pipeline micro-batch: sequences that step together. Under PP several groups fill the pipeline."""

    sequences: dict[int, Sequence] = field(default_factory=dict)
    """Resident sequences by id, oldest admission first."""
    in_flight: int = 0
    """Forwards of this group in flight."""


class Replica:
    """Device pool, slots and micro-batch groups of one replica.

    A transition to another layout makes new replicas; an old one lives on until its last Forward and copy
    have come back, so that late completions find the pool their blocks belong to.
    """

    def __init__(self, *, index: int, blocks: int, stages: int, max_running: int) -> None:
        self.index = index
        self.pool = BlockPool(blocks)
        self.groups = [Group() for _ in range(stages)]
        self.max_running = max_running
        self.in_flight = 0
        """Forwards in flight."""
        self.leaving_blocks = 0
        """Device blocks of sequences that have left and are not idle yet: free soon."""
        self.filling = True
        """Policy `decode-first` under a static plan: whether a new batch is being prefilled."""
        self.closing: list[int] = []
        """Slots given up since the last Forward; the next one tells the workers."""
        self._free_slots: list[int] = []
        self._slots = 0

    @property
    def resident(self) -> int:
        """Sequences that hold a place on this replica."""
        return sum(len(group.sequences) for group in self.groups)

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.groups)

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
