"""`Sequence`: the tokens and the state of one completion on its way through the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from seesaw.core.actions import ChosenToken
from seesaw.core.request import FinishReason, Request

if TYPE_CHECKING:
    from seesaw.scheduling.lockstep import Lockstep
    from seesaw.scheduling.replica import Replica


class Status(enum.Enum):
    """Where a sequence stands. Its KV lives where the name says."""

    WAITING = "waiting"
    """No KV anywhere; its tokens must be (re)computed."""
    PREFILLING = "prefilling"
    """Holds device blocks for all its tokens; some have been fed."""
    RUNNING = "running"
    """On a device, decoding."""
    SWAPPING_OUT = "swapping out"
    """Its KV is being copied to the host; no further Forward takes it."""
    HOST = "host"
    """Its KV is whole in the host buffer."""
    SWAPPING_IN = "swapping in"
    """Its KV is being copied to a device."""
    DROPPING = "dropping"
    """Preempted without room on the host: back to WAITING once nothing of it is in flight."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One completion of a request. The scheduler alone writes it.

    `tokens` holds the prompt and what was generated. `cached` tokens of it are in the KV cache, or will be
    once the Forwards in flight have run. While it decodes, that follows from the number of its group's steps, so
    that a step writes nothing here.
    """

    id: int
    request: Request
    index: int
    """Which of the request's `n` completions."""
    tokens: list[int]
    prompt_tokens: int
    limit: int
    """Tokens (prompt included) at which it ends with reason `length`."""
    stop_ids: frozenset[int]
    """Tokens that end it."""

    status: Status = field(default=Status.WAITING, init=False)
    _cached: int = field(default=0, init=False)
    """`cached`, but for the steps of its lockstep."""
    _last_forward: int = field(default=-1, init=False)
    """`last_forward`, before it took a step of its lockstep."""

    home: Replica | None = field(default=None, init=False)
    """The replica whose pool `device_blocks` belong to."""
    group: int = field(default=-1, init=False)
    slot: int = field(default=-1, init=False)
    """Row in the workers' tables; -1 until its next Forward opens one."""
    admitted: int = field(default=-1, init=False)
    """Order of admission to its device; the youngest is preempted first."""
    device_blocks: list[int] = field(default_factory=list, init=False)
    capacity: int = field(default=0, init=False)
    """Tokens that `device_blocks` hold."""
    known_blocks: int = field(default=0, init=False)
    """How many of `device_blocks` the workers have been told."""
    untold: bool = field(default=True, init=False)
    """Whether there are more, or no slot yet."""
    lockstep: Lockstep | None = field(default=None, init=False)
    """Whose member it is; `Lockstep` keeps it, as well as `due_step`."""
    due_step: int = field(default=-1, init=False)
    _joined: int = field(default=-1, init=False)
    """Steps that the lockstep had taken when it became a member."""
    expected_blocks: int = field(default=0, init=False)
    """Device blocks it is expected to need in the end; `Replica` keeps it."""
    host_blocks: list[int] = field(default_factory=list, init=False)
    written_through: int = field(default=0, init=False)
    """How many blocks of the prompt have been handed to write-through copies."""
    copies: int = field(default=0, init=False)
    """Copies in flight that read or write its blocks."""

    logprobs: list[ChosenToken | None] = field(default_factory=list, init=False)
    prompt_logprobs: list[ChosenToken] = field(default_factory=list, init=False)
    """Of the prompt's tokens from `first_score` on, as far as they have come back."""
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)

    @property
    def cached(self) -> int:
        """Tokens in the KV cache, once the Forwards in flight have run."""
        return self._cached if self.lockstep is None else self._cached + self.lockstep.steps

    @cached.setter
    def cached(self, tokens: int) -> None:
        assert self.lockstep is None, "the steps of its lockstep count its tokens"
        self._cached = tokens

    @property
    def last_forward(self) -> int:
        """Id of the latest Forward on its present device that contains it; -1 for none."""
        if self.lockstep is None or self.lockstep.steps == self._joined:
            return self._last_forward
        return self.lockstep.latest

    def arrive(self, home: Replica, group: int) -> None:
        """It has a place on a device; no Forward there contains it yet."""
        self.home, self.group, self._last_forward = home, group, -1

    def feed(self, tokens: int, forward: int) -> None:
        """So many more of its tokens are fed, by Forward number `forward`."""
        self.cached += tokens
        self._last_forward = forward

    def enter(self, lockstep: Lockstep) -> None:
        """From now on every step of `lockstep` feeds a token of it, without its being written to."""
        self._cached -= lockstep.steps
        self._joined = lockstep.steps
        self.lockstep = lockstep

    def exit(self) -> None:
        """Keep what the steps of its lockstep came to."""
        self._cached, self._last_forward, self.lockstep = self.cached, self.last_forward, None

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def first_score(self) -> int:
        """Number of the first token of the prompt whose log-probability is wanted; its length if none is."""
        sampling, prompt = self.request.sampling, len(self.request.prompt_token_ids)
        if sampling.prompt_logprobs is None or self.index:  # one of the completions stands for all
            return prompt
        return min(max(1, sampling.prompt_logprobs_start), prompt)

    @property
    def ended_by_token(self) -> bool:
        """Whether its last token is one that ends it, and so no part of its text."""
        return self.finish_reason == "stop" and self.tokens[-1] in self.stop_ids

    @property
    def pending(self) -> int:
        """Tokens that have been asked for and not yet come back."""
        return max(0, self.cached + 1 - len(self.tokens))

    @property
    def forwarded(self) -> bool:
        """Whether a Forward in flight contains it. Those of a replica come back in order."""
        return self.home is not None and self.last_forward > self.home.completed

    @property
    def idle(self) -> bool:
        """Whether nothing in flight touches it."""
        return self.copies == 0 and not self.forwarded

    def off_device(self) -> None:
        """Forget its device and all that is in flight: neither exists any more."""
        self.exit()
        self.home, self.group, self.slot, self._last_forward = None, -1, -1, -1
        self.device_blocks, self.capacity, self.known_blocks, self.untold = [], 0, 0, True
        self.copies = 0

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_tokens :]
