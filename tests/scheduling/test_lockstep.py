"""Decode steps: who is looked at when, what is fed, and what the steps come to."""

from __future__ import annotations

import pytest

from seesaw.core.actions import FEEDBACK, Forward
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.scheduling.batch import BatchBuilder
from seesaw.scheduling.replica import Replica
from seesaw.scheduling.sequence import Sequence, Status

PROMPT, BLOCK = 3, 4


def replica() -> Replica:
    return Replica(index=0, blocks=64, block_size=BLOCK, groups=1, max_running=8)


def resident(home: Replica, id: int, output: int = 20) -> Sequence:
    """A sequence with blocks for its prompt, of which nothing has been fed."""
    request = Request(
        id=str(id), prompt_token_ids=(7,) * PROMPT, sampling=SamplingParams(temperature=0, max_tokens=output)
    )
    sequence = Sequence(
        id=id,
        request=request,
        index=0,
        tokens=[7] * PROMPT,
        prompt_tokens=PROMPT,
        limit=PROMPT + output,
        stop_ids=frozenset(),
    )
    home.join(sequence, 0, -(-PROMPT // BLOCK))
    return sequence


def prefill(home: Replica, id: int, *sequences: Sequence) -> Forward:
    """Forward number `id`, of whole prompts."""
    batch = BatchBuilder(id, home, 0, 0, True)
    for sequence in sequences:
        batch.feed(sequence, PROMPT)
        sequence.status = Status.RUNNING
        home.groups[0].lockstep.add(sequence)
    return batch.build()[0]


def step(home: Replica, id: int) -> Forward:
    """Forward number `id`, a step of all that decode."""
    lockstep, batch = home.groups[0].lockstep, BatchBuilder(id, home, 0, 0, True)
    due = lockstep.due()
    last = lockstep.prepare(due, home.grow)
    assert last is not None
    batch.feed_all(lockstep, due, last)
    lockstep.stepped(id, last)
    lockstep.check(list(home.groups[0].sequences.values()))
    return batch.build()[0]


def test_a_sequence_is_looked_at_when_its_blocks_are_full_and_for_its_last_token() -> None:
    home = replica()
    sequence = resident(home, 0, output=9)  # feeds tokens 3 to 10 in steps: the ninth is not fed
    prefill(home, 0, sequence)
    looked, grown = [], []
    lockstep = home.groups[0].lockstep
    for number in range(1, 9):
        if sequence in lockstep._calendar.get(lockstep.steps, ()):
            looked.append(sequence.cached)
        grown += [sequence.cached for _ in step(home, number).new_blocks]
    assert looked == [3, 4, 8, 10]  # as it begins, with the blocks full at 4 and 8, and for its last token
    assert grown == [5, 9]
    assert not lockstep.members and sequence.cached == 11 and sequence.last_forward == 8


def test_a_step_feeds_the_token_that_has_come_back_and_stands_for_one_that_has_not() -> None:
    home = replica()
    sequence = resident(home, 0)
    prefill(home, 1, sequence)
    ahead = step(home, 2)
    assert (ahead.tokens, ahead.feedback_from) == ([FEEDBACK], 1)
    sequence.tokens.append(11)
    home.completed = 1
    further = step(home, 3)
    assert (further.tokens, further.feedback_from) == ([FEEDBACK], 2)
    sequence.tokens += [12, 13]
    home.completed = 3  # the very Forward that took the latest step
    known = step(home, 4)
    assert (known.tokens, known.feedback_from) == ([13], -1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_step_waits_for_the_latest_forward_whose_token_it_feeds(order: tuple[int, int]) -> None:
    home = replica()
    sequences = [resident(home, id) for id in range(2)]
    for at, sequence in enumerate(sequences, start=1):
        batch = BatchBuilder(at, home, 0, 0, True)
        batch.feed(sequence, PROMPT)
        batch.build()
    for which in order:
        sequences[which].status = Status.RUNNING
        home.groups[0].lockstep.add(sequences[which])
    first = step(home, 3)
    assert (first.tokens, first.feedback_from) == ([FEEDBACK, FEEDBACK], 2)


def test_who_joins_waits_for_its_own_forward_beside_those_that_stepped() -> None:
    home = replica()
    old, new = resident(home, 0), resident(home, 1)
    batch = BatchBuilder(1, home, 0, 0, True)
    batch.feed(new, PROMPT)
    batch.build()
    prefill(home, 2, old)
    step(home, 3)
    new.status = Status.RUNNING
    home.groups[0].lockstep.add(new)
    assert (new.last_forward, old.last_forward) == (1, 3)
    both = step(home, 4)
    assert (both.tokens, both.feedback_from) == ([FEEDBACK, FEEDBACK], 3)
    assert both.slots == [old.slot, new.slot] and both.starts == [PROMPT + 1, PROMPT]


def test_who_leaves_keeps_what_the_steps_came_to() -> None:
    home = replica()
    first, second, third = (resident(home, id) for id in range(3))
    prefill(home, 1, first, second, third)
    step(home, 2)
    home.leave(second)
    left = step(home, 3)
    assert left.slots == [first.slot, third.slot] and left.starts == [PROMPT + 1] * 2
    assert (second.cached, second.last_forward) == (PROMPT + 1, 2)
    assert (first.cached, first.last_forward) == (PROMPT + 2, 3)
    with pytest.raises(AssertionError, match="lockstep"):
        first.cached = 0


def test_after_a_step_that_some_sat_out_each_is_fed_from_where_it_stands() -> None:
    home = replica()
    first, second = resident(home, 0), resident(home, 1)
    prefill(home, 1, first, second)
    step(home, 2)
    lockstep, batch = home.groups[0].lockstep, BatchBuilder(3, home, 0, 0, True)
    assert lockstep.dissolve() == [first, second]
    home.grow(second)
    batch.feed_some([second])
    lockstep.start_over([first, second], 3)
    assert batch.build()[0].feedback_from == 2
    assert [(s.cached, s.last_forward) for s in (first, second)] == [(PROMPT + 1, 2), (PROMPT + 2, 3)]
    both = step(home, 4)
    assert both.starts == [PROMPT + 1, PROMPT + 2] and both.feedback_from == 3
