"""`Meter`: what an engine's run costs, by what the ranks were doing."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from seesaw.core.actions import Action, Completion, CopiesDone, Forward, ForwardDone, SwapIn, Transition
from seesaw.core.stats import TransitionRecord
from seesaw.recording.bounded import History, Lengths, Phases
from seesaw.recording.tracing import EngineTrace


class _Forward(NamedTuple):
    """A Forward in flight, as it will be counted."""

    label: str
    tokens: int
    sampled: int
    stepped: int
    """Tokens of decode steps."""
    keys: int
    """(query, key) pairs of its attention."""
    keys_read: int
    """Of these, those of decode steps."""


@dataclass(slots=True)
class Meter:
    """Counts and times of an engine, fed with its actions and completions; read by `EngineStats`.

    A label is `prefill`, `decode`, `mixed` (a plan whose batches hold both), `transition` or `idle`.
    """

    separate: bool
    """Whether the plan separates its phases."""
    mode: str
    """How weights change."""
    targets: tuple[str, ...]
    """Layouts by phase."""
    trace: EngineTrace | None = None
    """Where the control process's doings are told as well."""
    started: float = field(default_factory=time.monotonic)
    """When the engine started, on the monotonic clock."""
    activity: str = "idle"
    """What the ranks were last found to be doing."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time waited for the ranks."""
    host_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Processor time of the loop between actions and completions."""
    rank_host_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time of a sampling rank that went to anything but the model."""
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Forwards completed."""
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens fed to Forwards completed."""
    sampled: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens sampled by them."""
    stepped: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens fed to them in decode steps."""
    keys: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """(query, key) pairs of their attention, in one layer without a window."""
    keys_read: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of these pairs, those of decode steps."""
    wall_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """All time between `begin` and `rest`."""
    phases: Phases = field(default_factory=Phases)
    lengths: Lengths = field(default_factory=Lengths)
    """Of sequences that ended."""
    transitions: list[TransitionRecord] = field(default_factory=list)
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    _forwards: dict[int, _Forward] = field(default_factory=dict)
    """Forwards in flight."""
    _changes: dict[int, int] = field(default_factory=dict)
    """Transitions in flight: the phase they lead to."""
    _swap_ins: set[int] = field(default_factory=set)
    _processor: float = 0.0
    _booked: float | None = None
    """Until when time is booked to an activity; None while nothing is served."""
    _since: float = 0.0
    """When the present activity began."""
    _began: float = 0.0
    """When the present round, or the taking in of its completions, began."""
    _completions: int = 0

    def lost(self) -> None:
        """Nothing that is in flight will come back."""
        self._forwards.clear()
        self._changes.clear()
        self._swap_ins.clear()

    def begin(self) -> None:
        """Processor time is the loop's from here on."""
        self._processor = time.thread_time()
        self._began = time.monotonic()
        if self._booked is None:
            self._booked = self._since = self._began

    def submitted(self, action: Action) -> None:
        """Note an action that goes to the ranks."""
        if isinstance(action, Forward):
            self._forwards[action.id] = _Forward(self._label(action), *_work(action))
        elif isinstance(action, Transition):
            self._changes[action.id] = action.target
        elif isinstance(action, SwapIn):
            self._swap_ins.add(action.id)
        if self.trace is not None:
            self.trace.submitted(action)

    def waited(self, seconds: float, completions: list[Completion]) -> None:
        """Book the wait for these completions to what the first of them was about."""
        now = time.monotonic()
        found = next((c for c in completions if not isinstance(c, CopiesDone)), None)
        if isinstance(found, ForwardDone):
            self._turn(self._forwards[found.id].label)
        elif found is not None:
            self._turn("transition")
        self._book(now)
        self.seconds[self.activity] += seconds
        self._began, self._completions = now, len(completions)
        for completion in completions:
            self._completed(completion)

    def scheduled(self) -> None:
        """All that can be done now has been submitted."""
        if self.trace is not None:
            self.trace.scheduled(self._began, time.monotonic())

    def taken_in(self) -> None:
        """The completions that were waited for have been taken in."""
        if self.trace is not None:
            self.trace.completed(self._began, time.monotonic(), self._completions)

    def end(self) -> None:
        """Book the time since `begin`."""
        self.host_seconds[self.activity] += time.thread_time() - self._processor
        if (
            self.activity != "idle"
        ):  # else the ranks have their first work, and the first result says what it is
            self._book(time.monotonic())

    def rest(self) -> None:
        """Nothing is served from here on, until `begin`."""
        self._turn("idle")
        self._booked = None

    def changed(self, since: float) -> None:
        """The ranks were replaced from `since` until now."""
        self._turn("transition")
        now = time.monotonic()
        self.seconds["transition"] += now - since
        self._book(now)

    def finished(self, prompt: int, output: int) -> None:
        """A sequence of so many prompt and output tokens has ended."""
        self.lengths.add(prompt, output)

    def history(self) -> History:
        """Phases, and lengths of sequences that ended. Safe to call from any thread."""
        lengths = self.lengths
        return History(
            phases=list(self.phases.spans),
            prompts=dict(lengths.prompts),
            outputs=dict(lengths.outputs),
            sample=list(lengths.sample),
        )

    def _turn(self, activity: str) -> None:
        """The ranks do something else since the time that was booked last."""
        if activity == self.activity or self._booked is None:
            return
        if self.trace is not None and self._booked > self._since and self.activity != "idle":
            self.trace.phase(self.activity, self._since, self._booked)
        self.activity = activity
        self._since = self._booked

    def _book(self, now: float) -> None:
        """Book the time until `now` to the present activity."""
        if self._booked is not None:
            self.wall_seconds[self.activity] += now - self._booked
            self.phases.add(self._booked - self.started, now - self._booked, self.activity)
            self._booked = now

    def _label(self, action: Forward) -> str:
        if not self.separate:
            return "mixed"
        return "decode" if action.decodes else "prefill"

    def _completed(self, completion: Completion) -> None:
        match completion:
            case ForwardDone():
                done = self._forwards.pop(completion.id)
                label = done.label
                self.steps[label] += 1
                self.tokens[label] += done.tokens
                self.sampled[label] += done.sampled
                self.stepped[label] += done.stepped
                self.keys[label] += done.keys
                self.keys_read[label] += done.keys_read
                self.rank_host_seconds[label] += completion.host_seconds
            case CopiesDone() if completion.id in self._swap_ins:
                self._swap_ins.discard(completion.id)
                self.swapped_in_bytes += completion.bytes
            case CopiesDone():
                self.swapped_out_bytes += completion.bytes
            case _:
                target = self.targets[self._changes.pop(completion.id)]
                self.transitions.append(
                    TransitionRecord(
                        target,
                        completion.bytes,
                        completion.seconds,
                        self.mode,
                        copied_bytes=completion.copied,
                        moving_seconds=completion.moving,
                        at=time.monotonic() - self.started,
                    )
                )


def _work(action: Forward) -> tuple[int, int, int, int, int]:
    """What a Forward does: the figures of `_Forward`, but for its label. A token sees those before it, and itself."""
    items = len(action.counts)
    if action.decodes:
        keys = sum(action.starts) + items
        return items, len(action.sampled), items, keys, keys
    stepped = keys = read = 0
    for start, count in zip(action.starts, action.counts, strict=True):
        if start > 0 and count == 1 and not action.write_through:  # only prefill is written through
            stepped += 1
            read += start + 1
        keys += count * start + count * (count + 1) // 2
    return sum(action.counts), len(action.sampled), stepped, keys, read
