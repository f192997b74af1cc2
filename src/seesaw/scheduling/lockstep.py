"""`Lockstep`: the decoding sequences of a micro-batch group, which all take one token at every step.

A step is a pass over these sequences for each token that is generated, so it must do little for each. What may happen
to a sequence at a step follows from counts that grow by one each time: its blocks are full, or its last token is
asked for. So a calendar says at which step each has to be looked at; at all others it is fed as it is.
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
        self._steps = 0
        self._calendar: defaultdict[int, list[Sequence]] = defaultdict(list)

    def add(self, sequence: Sequence) -> None:
        """A sequence of the group decodes from now on."""
        self.members.append(sequence)
        self.fresh += 1
        self.stops = self.stops or bool(sequence.stop_ids)
        self._look(sequence, 0)

    def remove(self, sequence: Sequence) -> None:
        """A member leaves the group, or wants no further token."""
        place = self.members.index(sequence)
        if place >= len(self.members) - self.fresh:
            self.fresh -= 1
        del self.members[place]
        sequence.lockstep = None

    def due(self) -> list[Sequence]:
        """The members that must be looked at before this step; those that have all their tokens are none any more."""
        now, noted = self._steps, self._calendar.pop(self._steps, ())
        due = []
        for sequence in noted:
            # an entry may be older than the sequence's return to the group
            if sequence.due_step == now and sequence.lockstep is self:
                sequence.due_step = -1
                due.append(sequence)
        return due

    def prepare(self, due: list[Sequence], grow: Callable[[Sequence], bool]) -> list[Sequence] | None:
        """Give the members that are `due` what they need for this step; returns those for whom it is the last.

        None if some get no block: then `start_over` must follow.
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

    def stepped(self, forward: int, last: list[Sequence]) -> None:
        """Every member takes this step in Forward number `forward`."""
        self._steps += 1
        self.latest, self.fresh, self.uneven = forward, 0, False
        for sequence in last:
            self.remove(sequence)

    def start_over(self, everyone: list[Sequence], forward: int) -> None:
        """After a step that some sat out: look at all of the group's sequences before the next."""
        self._calendar.clear()
        self._steps += 1
        self.latest, self.fresh, self.uneven = forward, 0, True
        for sequence in self.members:
            sequence.lockstep = None
        self.members = [s for s in everyone if s.status is Status.RUNNING and s.cached + 1 < s.limit]
        for sequence in self.members:
            self._look(sequence, 0)

    def check(self, everyone: list[Sequence]) -> None:
        """Assert that the members are those of `everyone` who want a token, and that none is overlooked."""
        wanting = [s for s in everyone if s.status is Status.RUNNING and s.cached + 1 < s.limit]
        assert {s.id for s in wanting} <= {s.id for s in self.members}, "a sequence is not fed"
        for sequence in self.members:
            assert sequence.status is Status.RUNNING and sequence.lockstep is self
            assert sequence.due_step >= self._steps and sequence in self._calendar[sequence.due_step]
            steps = sequence.due_step - self._steps
            assert steps == 0 or sequence.cached + steps <= min(sequence.capacity, sequence.limit - 2)

    def _look(self, sequence: Sequence, steps: int) -> None:
        """Look at a member after so many steps."""
        sequence.lockstep, sequence.due_step = self, self._steps + steps
        self._calendar[sequence.due_step].append(sequence)
