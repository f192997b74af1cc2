"""`SimulatedExecutor`: carries the scheduler's actions out on a virtual clock, by the cost model.

It keeps what is busy until when: every pipeline stage of every replica, and each replica's way to and from the
host buffer. An action's times follow from these as soon as it is submitted, since the actions of a replica run in
order; `wait` moves the clock to the next completion. Tokens are all the same: a simulated sequence ends by length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from seesaw.core.actions import (
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
from seesaw.planning.cost import Cost, LayoutCost, Work

StageRanks = Sequence[Sequence[Sequence[int]]]
"""Ranks by replica and stage."""
TOKEN = 0
"""What every simulated sequence says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What copies cost. Bytes per second are of one replica of the phase, all replicas busy."""

    block_bytes: float
    """KV of one block, over all layers and heads."""
    to_host: tuple[float, float]
    to_device: tuple[float, float]
    transition_bytes: tuple[int, int]
    """Fetched by all ranks to get to the prefill layout and to the decode layout."""
    transition_seconds: tuple[tuple[float, ...], tuple[float, ...]]
    """The same per rank, in seconds."""


@dataclass(slots=True)
class _Replica:
    """When what is busy of one replica comes free."""

    stages: list[float]
    out: float
    """Its way to the host."""
    into: float


@dataclass(slots=True)
class Spent:
    """What a simulation counted, in seconds over all stages of all replicas."""

    work: Cost = field(default_factory=Cost)
    hand_over: float = 0.0
    bubble: float = 0.0
    """Stages that waited for the one before them, or for a token."""


class SimulatedExecutor:
    """See `execution.base.Executor`. `costs` and `ranks` are (prefill, decode)."""

    def __init__(
        self,
        costs: tuple[LayoutCost, LayoutCost],
        ranks: tuple[StageRanks, StageRanks],
        moves: Moves,
    ) -> None:
        self.now = 0.0
        self.spent: tuple[Spent, Spent] = (Spent(), Spent())
        self._costs, self._moves = costs, moves
        self._ranks = ranks
        self._phase = 0
        self._replicas = [_Replica([0.0] * len(stages), 0.0, 0.0) for stages in ranks[0]]
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
                self._swap_out(action)
            case SwapIn():
                self._swap_in(action)
            case Transition():
                self._transition(action)

    def wait(self) -> list[Completion]:
        """The next completion, and all of the same instant."""
        assert self._events, "nothing is in flight"
        self.now = self._events[0][0]
        completions = []
        while self._events and self._events[0][0] == self.now:
            completions.append(heappop(self._events)[2])
        return completions

    def close(self) -> None:
        """There is nothing to end."""

    # ---- actions ------------------------------------------------------------------------------------------

    def _forward(self, action: Forward) -> None:
        cost, replica, spent = (
            self._costs[self._phase],
            self._replicas[action.replica],
            self.spent[self._phase],
        )
        work = work_of(action)
        ready = max(self.now, self._sampled.get(action.feedback_from, 0.0))
        hand_over = cost.hand_over(work.tokens)
        for stage, free in enumerate(replica.stages):
            start = max(ready, free)
            spent.bubble += max(0.0, start - max(free, self.now))
            each = cost.stage(stage, work)
            spent.work += each
            ready = replica.stages[stage] = start + each.seconds
            if stage + 1 < len(replica.stages):
                ready += hand_over
                spent.hand_over += hand_over
        if action.feedback:
            self._sampled = {id: at for id, at in self._sampled.items() if at > self.now}
            self._sampled[action.id] = ready
        self._at(ready, ForwardDone(action.id, [TOKEN] * len(action.sampled), []))
        if action.write_through:
            moved = len(action.write_through) * self._moves.block_bytes
            seconds = moved / self._moves.to_host[self._phase]
            replica.out = max(ready, max(replica.out, self.now) + seconds)
            self._at(replica.out, CopiesDone(action.id, int(moved), seconds))

    def _swap_out(self, action: SwapOut) -> None:
        replica, seconds, moved = self._copy(action, self._moves.to_host[self._phase])
        replica.out = max(replica.out, *replica.stages, self.now) + seconds
        self._at(replica.out, CopiesDone(action.id, moved, seconds))

    def _swap_in(self, action: SwapIn) -> None:
        replica, seconds, moved = self._copy(action, self._moves.to_device[self._phase])
        replica.into = max(replica.into, self.now) + seconds
        self._at(replica.into, CopiesDone(action.id, moved, seconds))

    def _copy(self, action: SwapOut | SwapIn, rate: float) -> tuple[_Replica, float, int]:
        moved = len(action.pairs) * self._moves.block_bytes
        return self._replicas[action.replica], moved / rate, int(moved)

    def _transition(self, action: Transition) -> None:
        """Each rank changes over when its stage is through with what came before."""
        free = {
            rank: max(at, self.now)
            for replica, of_replica in zip(self._replicas, self._ranks[self._phase], strict=True)
            for at, of_stage in zip(replica.stages, of_replica, strict=True)
            for rank in of_stage
        }
        seconds = self._moves.transition_seconds[action.target]
        done = {rank: at + seconds[rank] for rank, at in free.items()}
        started, drained = min(free.values()), max(max(r.out, r.into) for r in self._replicas)
        self._phase = action.target
        self._replicas = []
        for of_replica in self._ranks[self._phase]:
            stages = [max(done[rank] for rank in of_stage) for of_stage in of_replica]
            self._replicas.append(_Replica(stages, drained, max(drained, *stages)))
        end = max(done.values())
        moved = self._moves.transition_bytes[action.target]
        self._at(end, TransitionDone(action.id, moved, end - started, 0, max(seconds)))

    # ---- bookkeeping --------------------------------------------------------------------------------------

    def _at(self, time: float, completion: Completion) -> None:
        self._count += 1  # completions of one instant keep the order of their actions
        heappush(self._events, (time, self._count, completion))


def work_of(action: Forward) -> Work:
    """What a Forward has to do. A sequence that feeds one token reads keys, the others are prompts."""
    sampled = len(action.sampled)
    if action.decodes:
        batch = len(action.counts)
        return Work(tokens=batch, sampled=sampled, keys=float(sum(action.starts) + batch))
    totals: defaultdict[str, float] = defaultdict(float)
    for start, count in zip(action.starts, action.counts, strict=True):
        if count == 1:
            totals["keys"] += start + 1
        else:
            totals["pairs"] += count * start + count * (count + 1) / 2
    return Work(tokens=sum(action.counts), sampled=sampled, **totals)
