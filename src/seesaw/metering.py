"""`Meter`: what an engine's run costs, by what the ranks were doing."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from seesaw.core.actions import Action, Completion, CopiesDone, Forward, ForwardDone, SwapIn, Transition
from seesaw.core.stats import TransitionRecord


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
    transitions: list[TransitionRecord] = field(default_factory=list)
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    _forwards: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Forwards in flight: label and tokens."""
    _changes: dict[int, int] = field(default_factory=dict)
    """Transitions in flight: the phase they lead to."""
    _swap_ins: set[int] = field(default_factory=set)
    _processor: float = 0.0

    def lost(self) -> None:
        """Nothing that is in flight will come back."""
        self._forwards.clear()
        self._changes.clear()
        self._swap_ins.clear()

    def begin(self) -> None:
        """Processor time is the loop's from here on."""
        self._processor = time.thread_time()

    def submitted(self, action: Action) -> None:
        """Note an action that goes to the ranks."""
        if isinstance(action, Forward):
            self._forwards[action.id] = (self._label(action), sum(action.counts))
        elif isinstance(action, Transition):
            self._changes[action.id] = action.target
        elif isinstance(action, SwapIn):
            self._swap_ins.add(action.id)

    def waited(self, seconds: float, completions: list[Completion]) -> None:
        """Book the wait for these completions to what the first of them was about."""
        found = next((c for c in completions if not isinstance(c, CopiesDone)), None)
        if isinstance(found, ForwardDone):
            self.activity = self._forwards[found.id][0]
        elif found is not None:
            self.activity = "transition"
        self.seconds[self.activity] += seconds
        for completion in completions:
            self._completed(completion)

    def end(self) -> None:
        """Book the processor time since `begin`."""
        self.host_seconds[self.activity] += time.thread_time() - self._processor

    def _label(self, action: Forward) -> str:
        if not self.separate:
            return "mixed"
        return "decode" if action.decodes else "prefill"

    def _completed(self, completion: Completion) -> None:
        match completion:
            case ForwardDone():
                label, tokens = self._forwards.pop(completion.id)
                self.steps[label] += 1
                self.tokens[label] += tokens
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
                    )
                )
