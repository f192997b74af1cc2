"""`SimulatedExecutor`: carries the scheduler's actions out on a virtual clock, by the cost model.

It keeps what is busy until when: every pipeline stage of every replica, and the copies of each. An action's times
follow from these as soon as it is submitted, since the actions of a replica run in order; `wait` moves the clock to
the next completion. Tokens are all the same: a simulated sequence ends by length.

**What overlaps** is what overlaps on the engine's ranks. A rank has one queue of copies, beside its computation:

- write-through begins with its Forward on that stage and ends no earlier than it;
- a swap, out or in, is taken up when the stage is through with the Forwards before it, and runs beside later ones;
- a rank changes over when its stage is through and its copies are done, while later stages still compute.

**The host link.** Every rank has a fixed share of what the node's host memory gives in each direction (`Moves`): the
rate of its own link, but no more than its part of the node's when all ranks that copy in that phase do so at once.
A rank alone is not given what the others leave, so the shares never add up to more than the node has, whatever
coincides: swap-ins of one replica with the fetches of another that still changes over, or copies of several
replicas. On one rank they do not coincide, as it has one queue, which is empty when it changes over. Copies to the
host and from it do not slow each other down: links are full duplex, and both figures are measured with copies past
the caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from operator import attrgetter, sub

from seesaw.core.actions import (
    PREFILL,
    Action,
    Completion,
    CopiesDone,
    Forward,
    ForwardDone,
    SwapIn,
    SwapOut,
    Transition,
    TransitionDone,
)
from seesaw.planning.accounts import (
    ATTENTION,
    BUBBLE,
    CAUSES,
    HAND_OVER,
    IDLE,
    SWAP,
    TRANSITION,
    Accounts,
    PhaseReport,
)
from seesaw.planning.cost import Cost, LayoutCost, Work

StageRanks = Sequence[Sequence[Sequence[int]]]
"""Ranks by replica and stage."""
_MANY = 64
"""Tokens on their way, before those that have come are looked for."""
TOKEN = 0
"""What every simulated sequence says."""
_WORK = [CAUSES.index(name) for name in Cost.__struct_fields__]
_seconds_of = attrgetter(*Cost.__struct_fields__)
_Interval = tuple[int, float, float]
"""A cause, from when, until when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What copies cost. Pairs are (prefill, decode)."""

    block_bytes: float
    """KV of one block, over all layers and heads."""
    to_host: tuple[float, float]
    """Seconds that the ranks of a replica take to copy a block out, each its part of it."""
    to_device: tuple[float, float]
    transition_bytes: tuple[int, int]
    """Fetched by all ranks to get to the prefill layout and to the decode layout."""
    transition_seconds: tuple[tuple[float, ...], tuple[float, ...]]
    """The same per rank, in seconds."""


@dataclass(slots=True, eq=False)
class _Rows:
    """What Forwards with the same numbers of tokens and of sampled sequences have in common."""

    costs: list[Cost]
    """All but attention, by kind of stage."""
    booked: dict[int, float]
    """What the accounts get of that: seconds by cause, averaged over all stages."""
    hand_over: float
    """Seconds between two stages."""


class _Stages:
    """The pipeline stages of a layout's replicas, those of equal cost taken together."""

    def __init__(self, cost: LayoutCost, replicas: int) -> None:
        self.cost = cost
        keys = [cost.kind(stage) for stage in range(len(cost.stages))]
        different = list(dict.fromkeys(keys))
        self.kinds = [different.index(key) for key in keys]
        """The kind of each stage."""
        self.examples = [keys.index(key) for key in different]
        """A stage of each kind."""
        self.weights = [keys.count(key) / (len(keys) * replicas) for key in different]
        """Which share of all stages those of one kind on one replica are."""
        self.weight = 1 / (len(keys) * replicas)
        self._rows: dict[tuple[int, int], _Rows] = {}

    def rows(self, tokens: int, sampled: int) -> _Rows:
        """Kept, as steps repeat themselves."""
        found = self._rows.get((tokens, sampled))
        if found is None:
            costs = [self.cost.by_rows(stage, tokens, sampled) for stage in self.examples]
            booked: dict[int, float] = {}
            for cost, weight in zip(costs, self.weights, strict=True):
                for cause, seconds in zip(_WORK, _seconds_of(cost), strict=True):
                    if seconds:
                        booked[cause] = booked.get(cause, 0.0) + weight * seconds
            hand_over = self.cost.hand_over(tokens) if len(self.kinds) > 1 else 0.0
            found = self._rows[tokens, sampled] = _Rows(costs, booked, hand_over)
        return found

    def attention(self, work: Work) -> list[float]:
        """Seconds by kind of stage."""
        seconds = self.cost.attention(work)
        return [self.cost.attention_of(stage, seconds) for stage in self.examples]


@dataclass(slots=True, eq=False)
class _Passage:
    """One Forward's way through the stages of a replica."""

    free: list[float]
    """When each stage had come free before it."""
    starts: list[float]
    ends: list[float]
    rows: _Rows
    attention: list[float]
    """Seconds by kind of stage."""
    submitted: float
    before: float
    """When the Forward before it had left the last stage."""


@dataclass(slots=True, eq=False)
class _Replica:
    """When what is busy of one replica comes free."""

    shape: _Stages
    stages: list[float]
    copies: list[float]
    """The queue of copies, by stage."""
    left: float = 0.0
    """When the latest Forward leaves the last stage."""
    passages: deque[_Passage] = field(default_factory=deque)
    """Forwards that may not be booked yet, since a phase may still end before they do."""
    copying: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=32))
    """The latest times in which copies were outstanding, from their submission on."""

    def copy(self, start: float, end: float) -> None:
        """Note copies that are outstanding."""
        if self.copying and start <= self.copying[-1][1]:
            self.copying[-1] = (self.copying[-1][0], max(end, self.copying[-1][1]))
        else:
            self.copying.append((start, end))


class SimulatedExecutor:
    """See `execution.base.Executor`. `costs` and `ranks` are (prefill, decode); `separate` is whether the phases
    of the plan are."""

    def __init__(
        self,
        costs: tuple[LayoutCost, LayoutCost],
        ranks: tuple[StageRanks, StageRanks],
        moves: Moves,
        *,
        separate: bool,
    ) -> None:
        self.now = 0.0
        self._moves, self._ranks = moves, ranks
        self._shapes = [_Stages(cost, len(of)) for cost, of in zip(costs, ranks, strict=True)]
        self._layout = PREFILL
        self._replicas = [self._replica(PREFILL, [0.0] * len(stages)) for stages in ranks[PREFILL]]
        self._names = ("prefill", "decode") if separate else ("mixed", "mixed")
        self._phase = self._names[PREFILL]
        changes = separate and costs[0].layout != costs[1].layout
        phases = (*self._names, "transition") if changes else self._names
        self._accounts = Accounts(tuple(dict.fromkeys(phases)))
        self._changing: list[tuple[float, float]] = []
        """Since when and until when ranks change over, in the latest transition."""
        self._sampled: dict[int, float] = {}
        """When the tokens of a Forward are known on the first stage."""
        self._events: list[tuple[float, int, Completion]] = []
        self._count = 0

    def submit(self, action: Action) -> None:
        """Take an action in; all its times are known at once."""
        match action:
            case Forward():
                self._forward(action)
            case SwapOut():
                self._copy(action, self._moves.to_host[self._layout])
            case SwapIn():
                self._copy(action, self._moves.to_device[self._layout])
            case Transition():
                self._transition(action)

    def turn(self, phase: int) -> None:
        """The phase changes without a transition: what follows belongs to the other one, which begins when all
        stages are through with what was submitted so far."""
        self._phase = self._names[phase]
        self._accounts.begin(self._phase, max(self.now, *(max(r.stages) for r in self._replicas)))

    @property
    def in_flight(self) -> int:
        """Completions that are outstanding."""
        return len(self._events)

    def wait(self, until: float = inf) -> list[Completion]:
        """The next completion, and all of the same instant; none if the clock comes to `until` before."""
        if not self._events or self._events[0][0] > until:
            assert until < inf, "nothing is in flight"
            self.now = max(self.now, until)
            return []
        self.now = self._events[0][0]
        completions = []
        while self._events and self._events[0][0] == self.now:
            completions.append(heappop(self._events)[2])
        return completions

    def close(self) -> None:
        """There is nothing to end."""

    def report(self) -> dict[str, PhaseReport]:
        """Where the time went, by phase. To be called once, at the end, when all requests have ended."""
        self._leave(self.now)
        return self._accounts.report(self.now)

    # ---- actions ------------------------------------------------------------------------------------------

    def _forward(self, action: Forward) -> None:
        replica, work = self._replicas[action.replica], work_of(action)
        shape, now = replica.shape, self.now
        self._settle(replica, now)
        self._accounts.count(self._phase, work.tokens, work.sampled)
        rows, attention = shape.rows(work.tokens, work.sampled), shape.attention(work)
        seconds = [cost.with_attention(more) for cost, more in zip(rows.costs, attention, strict=True)]
        hand_over = rows.hand_over
        ready, starts, ends = max(now, self._sampled.get(action.feedback_from, 0.0)), [], []
        for free, kind in zip(replica.stages, shape.kinds, strict=True):
            start = ready if ready > free else free
            end = start + seconds[kind]
            starts.append(start)
            ends.append(end)
            ready = end + hand_over
        passage = _Passage(replica.stages, starts, ends, rows, attention, now, replica.left)
        replica.passages.append(passage)
        replica.stages, replica.left = ends, end
        if action.feedback:
            if len(self._sampled) > _MANY:
                self._sampled = {id: at for id, at in self._sampled.items() if at > now}
            self._sampled[action.id] = end
        self._at(end, ForwardDone(action.id, [TOKEN] * work.sampled, []))
        if action.write_through:
            self._write_through(action, replica, starts)

    def _write_through(self, action: Forward, replica: _Replica, starts: list[float]) -> None:
        blocks = len(action.write_through)
        seconds = blocks * self._moves.to_host[self._layout]
        for stage, (start, end) in enumerate(zip(starts, replica.stages, strict=True)):
            replica.copies[stage] = max(end, max(replica.copies[stage], start) + seconds)
        self._copies_done(action.id, replica, blocks, seconds)

    def _copy(self, action: SwapOut | SwapIn, each: float) -> None:
        replica, blocks = self._replicas[action.replica], len(action.pairs)
        seconds = blocks * each
        for stage, free in enumerate(replica.stages):
            replica.copies[stage] = max(replica.copies[stage], free, self.now) + seconds
        self._copies_done(action.id, replica, blocks, seconds)

    def _copies_done(self, id: int, replica: _Replica, blocks: int, seconds: float) -> None:
        end = max(replica.copies)
        replica.copy(self.now, end)
        self._at(end, CopiesDone(id, int(blocks * self._moves.block_bytes), seconds))

    def _transition(self, action: Transition) -> None:
        seconds, old = self._moves.transition_seconds[action.target], self._ranks[self._layout]
        begins = {
            rank: max(self.now, free, copied)
            for replica, of_replica in zip(self._replicas, old, strict=True)
            for free, copied, of_stage in zip(replica.stages, replica.copies, of_replica, strict=True)
            for rank in of_stage
        }
        done = {rank: at + seconds[rank] for rank, at in begins.items()}
        start, end = min(begins.values()), max(done.values())
        self._accounts.begin("transition", start)
        self._phase = self._names[action.target]
        self._accounts.begin(self._phase, end)
        self._leave()
        self._layout = action.target
        self._replicas = []
        for of_replica in self._ranks[action.target]:
            stages = [max(done[rank] for rank in of_stage) for of_stage in of_replica]
            self._replicas.append(self._replica(action.target, stages))
            for at, of_stage in zip(stages, of_replica, strict=True):
                self._changing += [(begins[rank], at) for rank in of_stage]
        moved = self._moves.transition_bytes[action.target]
        self._at(end, TransitionDone(action.id, moved, end - start, 0, max(seconds)))

    def _leave(self, until: float = inf) -> None:
        """Book everything that the ranks did in their layout, and while they changed to it.

        A rank that has no part in the end of a job may be found changing over: the job is over without it.
        """
        for start, end in self._changing:
            self._accounts.book(TRANSITION, start, min(end, until), 1 / len(self._changing))
        self._changing = []
        for replica in self._replicas:
            self._settle(replica, inf)
            weight = replica.shape.weight
            for free, copied in zip(replica.stages, replica.copies, strict=True):
                for cause, start, end in _rest(replica, free, self.now):
                    self._accounts.book(cause, start, end, weight)
                self._accounts.book(SWAP, max(free, self.now), min(copied, until), weight)

    # ---- bookkeeping --------------------------------------------------------------------------------------

    def _replica(self, layout: int, free: list[float]) -> _Replica:
        return _Replica(self._shapes[layout], free, list(free))

    def _at(self, time: float, completion: Completion) -> None:
        self._count += 1  # completions of one instant keep the order of their actions
        heappush(self._events, (time, self._count, completion))

    def _settle(self, replica: _Replica, until: float) -> None:
        """Book the Forwards that have ended `until` then."""
        passages = replica.passages
        while passages and passages[0].ends[-1] <= until:
            passage = passages.popleft()
            sums = self._accounts.within(min(passage.free))
            if sums is None:
                self._book_apart(replica, passage)
            else:
                _book(replica, passage, sums)

    def _book_apart(self, replica: _Replica, passage: _Passage) -> None:
        """Book a Forward on which a phase may begin."""
        shape, book = replica.shape, self._accounts
        for stage, kind in enumerate(shape.kinds):
            start, end = passage.starts[stage], passage.ends[stage]
            causes = dict(zip(_WORK, _seconds_of(passage.rows.costs[kind]), strict=True))
            causes[ATTENTION] += passage.attention[kind]
            book.book_all(causes, start, end, shape.weight)
            for cause, since, until in _gap(replica, passage, stage):
                book.book(cause, since, until, shape.weight)


def _book(replica: _Replica, passage: _Passage, sums: list[float]) -> None:
    """Book a Forward that lies within one phase."""
    shape = replica.shape
    for cause, seconds in passage.rows.booked.items():
        sums[cause] += seconds
    for seconds, weight in zip(passage.attention, shape.weights, strict=True):
        sums[ATTENTION] += weight * seconds
    if passage.before < passage.submitted:
        for stage, (free, start) in enumerate(zip(passage.free, passage.starts, strict=True)):
            if start > free:
                for cause, since, until in _gap(replica, passage, stage):
                    sums[cause] += shape.weight * (until - since)
        return
    # As `_gap`, where it comes to two causes: nearly all of the Forwards of a job.
    gaps = list(map(sub, passage.starts, passage.free))
    handed, most = 0.0, passage.rows.hand_over
    if len(gaps) > 1:
        handed = sum([gap if gap < most else most for gap in gaps[1:]])
    sums[HAND_OVER] += shape.weight * handed
    sums[BUBBLE] += shape.weight * (sum(gaps) - handed)


def _gap(replica: _Replica, passage: _Passage, stage: int) -> Iterator[_Interval]:
    """Why a stage did nothing before a Forward came to it."""
    start, end = passage.free[stage], passage.starts[stage]
    if stage and end > start:
        left = max(start, end - passage.rows.hand_over)
        yield HAND_OVER, left, end
        end = left
    # Until the Forward before had left, a token was on its way; since this one was submitted, it is.
    quiet = min(max(start, passage.before), end)
    asked = max(quiet, min(end, passage.submitted))
    if quiet > start:
        yield BUBBLE, start, quiet
    yield from _quiet(replica, quiet, asked)
    if end > asked:
        yield BUBBLE, asked, end


def _rest(replica: _Replica, start: float, end: float) -> Iterator[_Interval]:
    """Why a stage does nothing when no Forward comes any more."""
    quiet = min(max(start, replica.left), end)
    if quiet > start:
        yield BUBBLE, start, quiet
    yield from _quiet(replica, quiet, end)


def _quiet(replica: _Replica, start: float, end: float) -> Iterator[_Interval]:
    """No Forward is on the replica: copies are outstanding, or it has nothing to wait for."""
    for since, until in replica.copying:
        if until <= start:
            continue
        if since >= end:
            break
        if since > start:
            yield IDLE, start, since
            start = since
        yield SWAP, start, min(until, end)
        start = min(until, end)
    if end > start:
        yield IDLE, start, end


def work_of(action: Forward) -> Work:
    """What a Forward has to do. A sequence that feeds one token reads keys, the others are prompts."""
    batch, tokens, sampled = len(action.counts), len(action.tokens), len(action.sampled)
    if tokens == batch:
        return Work(tokens=batch, sampled=sampled, keys=float(sum(action.starts) + batch))
    keys = pairs = 0
    for start, count in zip(action.starts, action.counts, strict=True):
        if count == 1:
            keys += start + 1
        else:
            pairs += count * (2 * start + count + 1)
    return Work(tokens=tokens, sampled=sampled, keys=float(keys), pairs=pairs / 2)
