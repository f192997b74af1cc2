"""What time is booked to, by a clock in hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from seesaw import metering
from seesaw.core.actions import Forward, ForwardDone, Transition, TransitionDone
from seesaw.metering import Meter


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still, but for what is given here, in seconds."""
    now = 100.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, thread_time=lambda: now)
    monkeypatch.setattr(metering, "time", clock)
    return advance


def forward(action_id: int, *, start: int, count: int) -> Forward:
    """One sequence."""
    return Forward(
        id=action_id,
        replica=0,
        slots=[0],
        starts=[start],
        counts=[count],
        tokens=[1] * count,
        sampled=[0],
        open=[],
        close=[],
        new_blocks=[],
        write_through=[(0, 0)] if start == 0 else [],
        feedback=False,
        feedback_from=-1,
    )


def spans(meter: Meter) -> list[tuple[float, float, str]]:
    """(start, seconds, phase) of the history."""
    return [(span.start, span.seconds, span.phase) for span in meter.history().phases]


def test_the_first_phase_begins_when_the_ranks_are_given_work(tick: Callable[[float], None]) -> None:
    """However long the loop works before it waits, and whatever it finds the ranks to have done."""
    meter = Meter(separate=True, mode="fetch", targets=("P2", "T2"), started=100.0)
    tick(7)
    meter.begin()
    tick(1)
    meter.submitted(forward(1, start=0, count=8))
    tick(2)
    meter.end()
    assert spans(meter) == []  # what it is can only be said when something is done
    meter.begin()
    tick(5)
    meter.waited(5.0, [ForwardDone(1, [3], [])])
    assert spans(meter) == [(7.0, 8.0, "prefill")]
    assert dict(meter.wall_seconds) == {"prefill": 8.0}
    assert dict(meter.seconds) == {"prefill": 5.0}


def test_time_between_two_waits_belongs_to_what_was_done_last(tick: Callable[[float], None]) -> None:
    """Until the next result says that the ranks do something else."""
    meter = Meter(separate=True, mode="fetch", targets=("P2", "T2"), started=100.0)
    meter.begin()
    meter.submitted(forward(1, start=0, count=8))
    meter.submitted(Transition(id=2, target=1))
    tick(4)
    meter.waited(4.0, [ForwardDone(1, [3], [])])
    tick(1)
    meter.end()
    meter.begin()
    tick(2)
    meter.waited(2.0, [TransitionDone(2, 10, 2.0, 0, 2.0)])
    assert spans(meter) == [(0.0, 5.0, "prefill"), (5.0, 2.0, "transition")]
    meter.rest()
    tick(50)
    meter.begin()
    meter.submitted(forward(3, start=8, count=1))
    tick(1)
    meter.waited(1.0, [ForwardDone(3, [3], [])])
    assert spans(meter)[2:] == [(57.0, 1.0, "decode")]  # nothing is booked while nothing is served
