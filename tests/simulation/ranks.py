"""Simulated ranks: paged token memory, the toy model, a clock of chance, and whatever goes wrong with them.

What runs when is drawn from the job's own random numbers. Within what `core.actions` promises anything may happen:
the Forwards of a replica run, and are reported, in order; copies and transitions run beside them and are reported in
any order, early or late, alone or many at once. A copy moves its blocks at its end, so that whoever reuses them
before that is found out. When ranks are lost, copies in flight have written any part of their blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NoReturn

from seesaw.core.actions import (
    FEEDBACK,
    PREFILL,
    Action,
    ChosenToken,
    Completion,
    CopiesDone,
    Forward,
    ForwardDone,
    SamplingState,
    SwapIn,
    SwapOut,
    Transition,
    TransitionDone,
)
from seesaw.core.errors import EngineError, StartupError, WorkerError
from seesaw.deployment import Deployment
from tests.simulation.toy import UNWRITTEN, sample
from tests.simulation.violations import hold
from tests.simulation.watch import Watch
from tests.simulation.world import Fault, Job

Pages = dict[int, bytearray]
"""Blocks of memory by number."""


class Killed(BaseException):
    """The control process has been killed: nothing of it runs any more."""


@dataclass(slots=True)
class _Slot:
    """What the ranks of a replica keep of a sequence."""

    blocks: list[int]
    state: SamplingState | None
    sampled: list[int] = field(default_factory=list)
    sampled_by: int = -1
    fed_back: bool = False


@dataclass(slots=True)
class _Replica:
    """One replica of one layout: its memory, its slots, and until when it is busy."""

    ranks: frozenset[int]
    pages: Pages = field(default_factory=dict)
    slots: dict[int, _Slot] = field(default_factory=dict)
    ran: float = 0.0
    """When its latest Forward ends."""
    told: float = 0.0
    """When that is reported."""


@dataclass(slots=True)
class _Event:
    """Something that ends, or is reported, at some time."""

    ranks: frozenset[int]
    happen: Callable[[], None]
    copy: tuple[_Replica, list[tuple[int, int]]] | None = None
    """(device block, host block): a copy to the host that has not ended."""


class Ranks:
    """The executor of a simulated node. Its host memory outlives its ranks, as that of `LocalNode` does."""

    def __init__(self, job: Job, faults: list[Fault], watch: Watch) -> None:
        self.job, self.watch = job, watch
        self.events = 0
        self.host: Pages = {}
        self.raised: BaseException | None = None
        """The latest error that these ranks brought up."""
        self.lost: tuple[int, ...] = ()
        """The ranks that it said were lost."""
        self.started = False
        """Whether ranks were ever up."""
        self._rng: random.Random = job.rng
        self._faults = faults
        self._fail_start: str | None = None
        self._deployment: Deployment | None = None
        self._clear()

    def _clear(self) -> None:
        self._now, self._ticks = 0.0, 0
        self._queue: list[tuple[float, int, _Event]] = []
        self._stuck: list[_Event] = []
        """What will never happen, since its ranks are dead."""
        self._replicas: list[_Replica] = []
        self._out: list[Completion] = []
        self._dead: set[int] = set()
        self._notice = 0
        self._error: WorkerError | None = None
        self._phase = PREFILL

    # ---- ranks that start ---------------------------------------------------------------------------------

    def start(self, deployment: Deployment) -> None:
        """End the ranks that there are, wherever they stand, and start those of `deployment`."""
        self.watch.note("start", str(deployment.plan))
        self._tear()
        self._clear()
        previous, self._deployment = self._deployment, deployment
        self.watch.starting(previous, deployment, self.host)
        self._strike()
        if self._fail_start is not None:
            kind, self._fail_start = self._fail_start, None
            if kind == "startup":
                self._raise(StartupError("the ranks were not ready in time"))
            lost = self._choose(0.0)
            self._raise(WorkerError(f"ranks {lost} ended", rank=lost[0], phase="startup", lost=lost))
        self.started = True
        self._layout(PREFILL)

    def _layout(self, phase: int) -> None:
        assert self._deployment is not None
        self._phase, sharding = phase, self._deployment.shardings[phase]
        size = sharding.layout.replica_ranks
        parts = [sharding.ranks[i : i + size] for i in range(0, len(sharding.ranks), size)]
        self._replicas = [_Replica(frozenset(part), ran=self._now, told=self._now) for part in parts]
        self.watch.layout(self._deployment, phase)

    def _tear(self) -> None:
        """Copies to the host that have not ended have written some blocks, and of one of them a part."""
        for event in [*self._stuck, *(event for _, _, event in self._queue)]:
            if event.copy is not None:
                replica, pairs = event.copy
                some = pairs[: self._rng.randrange(len(pairs) + 1)]
                _copy_out(replica.pages, self.host, some)
                for _, block in some[-1:]:
                    torn = self.host[block]
                    del torn[self._rng.randrange(len(torn) + 1) :]

    # ---- the executor -------------------------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        """Take an action in."""
        assert self._replicas, "the ranks have not been started"
        self.watch.submitted(action)
        match action:
            case Forward():
                replica = self._replicas[action.replica]
                self._forward(replica, action)
            case SwapOut():
                replica = self._replicas[action.replica]
                self._copy_out(replica, action.id, action.pairs, replica.ran)
            case SwapIn():
                replica = self._replicas[action.replica]
                self._at(
                    self._now + self._lasts(1, replica.ranks),
                    _Event(replica.ranks, lambda: self._swap_in(replica, action)),
                )
            case Transition():
                everyone = frozenset(rank for replica in self._replicas for rank in replica.ranks)
                self._at(
                    self._now + self._lasts(2, everyone),
                    _Event(everyone, lambda: self._out.append(TransitionDone(action.id, 0, 0.0))),
                )
                self._layout(action.target)
        self._strike()

    def wait(self) -> list[Completion]:
        """What has ended. Raises what goes wrong."""
        assert self._replicas, "the ranks have not been started"
        self.watch.waiting()
        self._out.clear()
        until = -1.0
        while True:
            self._strike()
            if self._error is not None and (self.events >= self._notice or not self._queue):
                self._raise(self._error)
            if not self._queue:
                hold(self._out, "no deadlock", "the engine waits for nothing")
                break
            if self._out and self._queue[0][0] > until:
                break
            self._step()
            if self._out and until < 0:
                until = self._now + self._rng.random() * self.job.window
        found = list(self._out)
        self.watch.delivered(found)
        return found

    def close(self) -> None:
        """See `Executor`."""

    # ---- the clock ----------------------------------------------------------------------------------------

    def _at(self, time: float, event: _Event) -> None:
        self._ticks += 1
        heappush(self._queue, (time, self._ticks, event))

    def _step(self) -> None:
        """Let the next thing happen, unless its ranks are dead."""
        self._now, _, event = heappop(self._queue)
        self.events += 1
        if event.ranks.isdisjoint(self._dead):
            event.happen()
        else:
            self._stuck.append(event)

    def _lasts(self, what: int, ranks: frozenset[int]) -> float:
        mean = self.job.pace[what] * (40.0 if ranks & self.job.slow else 1.0)
        return self._rng.expovariate(1 / mean)

    def _reported(self, completion: Completion, ranks: frozenset[int]) -> None:
        late = self._rng.random() * self.job.lag
        self._at(self._now + late, _Event(ranks, lambda: self._out.append(completion)))

    # ---- what goes wrong ----------------------------------------------------------------------------------

    def _strike(self) -> None:
        """Let what is due go wrong."""
        self.events += 1
        while self._faults and self._faults[0].at <= self.events:
            fault = self._faults.pop(0)
            self.watch.note("fault", fault.kind)
            if fault.kind in ("die in start", "startup"):
                self._fail_start = fault.kind
            elif fault.kind == "killed":
                raise Killed
            elif fault.kind == "fail":
                self._break(WorkerError("rank 0 failed during swap-in", rank=0, phase="swap-in"), fault)
            else:
                lost = self._choose(fault.share)
                self._dead |= set(lost)
                gone = tuple(sorted(self._dead))
                self._break(WorkerError(f"ranks {gone} ended", rank=gone[0], phase="run", lost=gone), fault)

    def _break(self, error: WorkerError, fault: Fault) -> None:
        """From some moment on, `wait` raises. Ranks that died are the cause of what others say."""
        if self._error is None:
            self._notice = self.events + fault.grace
        if self._error is None or error.lost:
            self._error = error

    def _choose(self, share: float) -> tuple[int, ...]:
        assert self._deployment is not None
        world = self._deployment.plan.world
        count = min(world, max(1, round(share * world)))
        return tuple(sorted(self._rng.sample(range(world), count)))

    def _raise(self, error: EngineError) -> NoReturn:
        self.raised, self.lost = error, error.lost if isinstance(error, WorkerError) else ()
        self.watch.failing(error)
        raise error

    # ---- what ranks do ------------------------------------------------------------------------------------

    def _forward(self, replica: _Replica, action: Forward) -> None:
        replica.ran = max(self._now, replica.ran) + self._lasts(0, replica.ranks)
        self._at(replica.ran, _Event(replica.ranks, lambda: self._run(replica, action)))
        if action.write_through:
            self._copy_out(replica, action.id, action.write_through, replica.ran)

    def _copy_out(self, replica: _Replica, id: int, pairs: list[tuple[int, int]], after: float) -> None:
        def happen() -> None:
            _copy_out(replica.pages, self.host, pairs)
            self._reported(CopiesDone(id, 0, 0.0), replica.ranks)

        ends = max(self._now, after) + self._lasts(1, replica.ranks)
        self._at(ends, _Event(replica.ranks, happen, copy=(replica, pairs)))

    def _swap_in(self, replica: _Replica, action: SwapIn) -> None:
        for device, host in action.pairs:
            hold(host in self.host, "tokens", f"host block {host} is read and was never written")
            replica.pages[device] = bytearray(self.host[host])
        self._reported(CopiesDone(action.id, 0, 0.0), replica.ranks)

    def _run(self, replica: _Replica, action: Forward) -> None:
        self._update(replica, action)
        size = self._block_size
        tokens, choices, at, sampled = [], [], 0, set(action.sampled)
        for item, number in enumerate(action.slots):
            slot, start = replica.slots[number], action.starts[item]
            for position in range(start, start + action.counts[item]):
                token = action.tokens[at]
                at += 1
                if token == FEEDBACK:
                    token = _fed_back(slot, action)
                page = replica.pages.setdefault(slot.blocks[position // size], bytearray([UNWRITTEN]) * size)
                page[position % size] = token
            if item in sampled:
                prefix = self._read(replica, slot, start + action.counts[item])
                token, choice = _sample(slot, prefix)
                slot.sampled.append(token)
                slot.sampled_by, slot.fed_back = action.id, action.feedback
                tokens.append(token)
                choices.append(choice)
        asked = [choice for choice in choices if choice is not None]
        late = self._rng.random() * self.job.lag
        replica.told = max(replica.told, self._now + late)
        done = ForwardDone(action.id, tokens, choices if asked else [])
        self._at(replica.told, _Event(replica.ranks, lambda: self._out.append(done)))

    def _update(self, replica: _Replica, action: Forward) -> None:
        for number in action.close:
            hold(number in replica.slots, "slots", f"slot {number} is closed and not open")
            del replica.slots[number]
        for opened in action.open:
            hold(opened.slot not in replica.slots, "slots", f"slot {opened.slot} is opened twice")
            replica.slots[opened.slot] = _Slot(list(opened.blocks), opened.sampling)
        for number, block in action.new_blocks:
            replica.slots[number].blocks.append(block)

    def _read(self, replica: _Replica, slot: _Slot, length: int) -> bytes:
        blocks = slot.blocks[: -(-length // self._block_size)]
        hold(
            all(b in replica.pages for b in blocks), "tokens", "a device block is read and was never written"
        )
        prefix = b"".join([replica.pages[block] for block in blocks])[:length]
        whole = len(prefix) == length and UNWRITTEN not in prefix
        hold(whole, "tokens", "KV is read that was never written")
        return prefix

    @property
    def _block_size(self) -> int:
        assert self._deployment is not None
        return self._deployment.scheduler.block_size


def _copy_out(pages: Pages, host: Pages, pairs: list[tuple[int, int]]) -> None:
    for device, block in pairs:
        host[block] = bytearray(pages.get(device, b""))


def _fed_back(slot: _Slot, action: Forward) -> int:
    known = slot.sampled and slot.fed_back and slot.sampled_by <= action.feedback_from
    hold(known, "feedback", f"Forward {action.id} is fed a token that the ranks do not hand on")
    return slot.sampled[-1]


def _sample(slot: _Slot, prefix: bytes) -> tuple[int, ChosenToken | None]:
    state = slot.state
    if state is None:
        return sample(prefix, 0, 0, (), 0).token, None
    if state.prompt:
        seen = bytes([*state.prompt, *state.output, *slot.sampled])
        hold(seen == prefix, "tokens", "penalties are worked out from other tokens than the KV holds")
    index = state.generated + len(slot.sampled)
    banned = tuple(state.stop_token_ids) if index < state.min_tokens else ()
    noise = state.noise_key if state.temperature > 0 else 0
    new = sample(prefix, noise, index, banned, state.logprobs)
    return new.token, new.choice if state.logprobs >= 0 else None
