"""`Lockstep`: the decoding sequences of a micro-batch group, which all take one token at every step.

A step is a pass over these sequences for each token that is generated, so it must do little for each: it writes to
none of them, since what it changes in them follows from the number of steps taken. So does what may happen to a
sequence at a step, that its blocks are full, or that its last token is asked for: a calendar says at which step each
has to be looked at; at all others it is fed as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from seesaw.scheduling.sequence import Sequence, Status


class Lockstep:
    """Members are RUNNING and want another token; those that came later stand behind."""

    def __init__(self) -> None:
        self.members: list[Sequence] = []
        self.latest = -1
        """Id of the last Forward that took a step."""
        self.fresh = 0
        """How many members, the last ones, were not in it."""
        self.uneven = False
        """Whether others were not in it either."""
        self.stops = False
        """Whether a token may end a member, or one that has left."""
        self.steps = 0
        """Taken so far."""
        self._slots: list[int] = []
        self._bases: list[int] = []
        """Slots of the members but the fresh ones, and their cached tokens less `steps`: both are fixed."""
        self._calendar: defaultdict[int, list[Sequence]] = defaultdict(list)

    def add(self, sequence: Sequence) -> None:
        """A sequence of the group decodes from now on."""
        self.members.append(sequence)
        self.fresh += 1
        self.stops = self.stops or bool(sequence.stop_ids)
        sequence.enter(self)
        self._look(sequence, 0)

    def remove(self, sequence: Sequence) -> None:
        """A member leaves the group, or wants no further token."""
        place = self.members.index(sequence)
        if place >= len(self.members) - self.fresh:
            self.fresh -= 1
        del self.members[place], self._slots[place : place + 1], self._bases[place : place + 1]
        sequence.exit()

    def dissolve(self) -> list[Sequence]:
        """All members leave, for a step that some may sit out; `start_over` follows. Returns who they were."""
        members, self.members, self.fresh = self.members, [], 0
        self._slots, self._bases = [], []
        for sequence in members:
            sequence.exit()
        return members

    def due(self) -> list[Sequence]:
        """The members that must be looked at before this step; those that have all their tokens are none any more."""
        now, noted = self.steps, self._calendar.pop(self.steps, ())
        due = []
        for sequence in noted:
            # an entry may be older than the sequence's return to the group
            if sequence.due_step == now and sequence.lockstep is self:
                sequence.due_step = -1
                due.append(sequence)
        return due

    def prepare(self, due: list[Sequence], grow: Callable[[Sequence], bool]) -> list[Sequence] | None:
        """Give the members that are `due` what they need for this step; returns those for whom it is the last.

        None if some get no block: then `dissolve` must follow.
        """
        last = []
        for sequence in due:
            cached = sequence.cached
            left = sequence.limit - 2 - cached
            if left < 0:
                self.remove(sequence)  # nothing more is to be fed
                continue
            if cached >= sequence.capacity and not grow(sequence):
                return None
            if left == 0:
                last.append(sequence)
            else:
                self._look(sequence, min(left, sequence.capacity - cached))
        return last

    def columns(self) -> tuple[list[int], list[int]]:
        """Of every member, its slot and how many of its tokens are cached before this step. All have slots now."""
        fresh = self.members[len(self._slots) :]
        self._slots.extend([s.slot for s in fresh])
        self._bases.extend([s.cached - self.steps for s in fresh])
        steps = self.steps
        return self._slots, [base + steps for base in self._bases]

    def stepped(self, forward: int, last: list[Sequence]) -> None:
        """Every member takes this step in Forward number `forward`."""
        self.steps += 1
        self.latest, self.fresh, self.uneven = forward, 0, False
        for sequence in last:
            self.remove(sequence)

    def start_over(self, everyone: list[Sequence], forward: int) -> None:
        """After a step that some sat out: look at all of the group's sequences before the next."""
        self._calendar.clear()
        self.steps += 1
        self.latest, self.fresh, self.uneven = forward, 0, True
        self.members = [s for s in everyone if s.status is Status.RUNNING and s.cached + 1 < s.limit]
        for sequence in self.members:
            sequence.enter(self)
            self._look(sequence, 0)

    def check(self, everyone: list[Sequence]) -> None:
        """Assert that the members are those of `everyone` who want a token, and that none is overlooked."""
        wanting = [s for s in everyone if s.status is Status.RUNNING and s.cached + 1 < s.limit]
        assert {s.id for s in wanting} <= {s.id for s in self.members}, "a sequence is not fed"
        for sequence in self.members:
            assert sequence.status is Status.RUNNING and sequence.lockstep is self
            assert sequence.due_step >= self.steps and sequence in self._calendar[sequence.due_step]
            steps = sequence.due_step - self.steps
            assert steps == 0 or sequence.cached + steps <= min(sequence.capacity, sequence.limit - 2)

    def _look(self, sequence: Sequence, steps: int) -> None:
        """Look at a member after so many steps."""
        sequence.due_step = self.steps + steps
        self._calendar[sequence.due_step].append(sequence)
