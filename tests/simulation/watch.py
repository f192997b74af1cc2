"""`Watch`: what must hold of a job, checked as it runs. It sees every action, every completion, and the books."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from seesaw.core.actions import FEEDBACK, Action, Completion, CopiesDone, Forward, SwapIn, SwapOut, Transition
from seesaw.core.errors import EngineError, WorkerError
from seesaw.deployment import Deployment
from seesaw.engine import Engine
from seesaw.scheduling.integrity import check_integrity
from seesaw.scheduling.replica import Replica
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence, Status
from tests.simulation.room import fitting
from tests.simulation.violations import Violation, hold

if TYPE_CHECKING:
    from collections.abc import Mapping

ACTIONS_PER_TOKEN = 40
"""More of them than this for each token to be fed or sampled, and the engine goes in circles."""
SLOTS = 3
"""For each sequence that a batch can have: its own, that of the batch before, which the next one closes, and one."""
WHOLE = (Status.HOST, Status.SWAPPING_IN)
"""Where a sequence's KV is whole on the host."""

INVARIANTS = {
    "books": "`check_integrity` holds after every schedule and every completion",
    "budgets": "block numbers are in their pools; no batch has more tokens or logits than memory is set aside for",
    "one owner": "what is in flight for one sequence touches no block that something in flight for another does",
    "in flight": "what is in flight touches no block that is free, and no copy races another reader or writer",
    "feedback": "a token is fed back only from a Forward of these ranks that hands it on",
    "slots": "a slot is opened once, and closed before it is opened again",
    "once": "every row is answered exactly once, over all restarts",
    "tokens": "tokens, text, reasons and log-probabilities are those of the toy model",
    "refusals": "a row that cannot be served comes out with the code that says why",
    "kept": "KV that is whole on the host is the sequence's, survives a loss and is not computed again",
    "order": "over a loss queues keep their order, and what is computed again comes first, the oldest in front",
    "no deadlock": "while there is work, something is in flight",
    "no livelock": "a bounded number of actions for each token",
    "recovery": "the ranks that are left, and no others, go on; where some plan fits them, the job does not end",
    "no crash": "nothing but an `EngineError` comes out of the engine",
    "stops": "what ends a run is an error that was brought up, and a job can be resumed from it",
    "nothing remains": "at the end no block, no sequence, no job, no text is left",
    "same trace": "the same seed gives the same actions",
}


@dataclass(slots=True)
class Tally:
    """What jobs went through, so that a suite can show that it forced what it claims to."""

    jobs: int = 0
    engines: int = 0
    actions: int = 0
    outputs: int = 0
    refused: int = 0
    tokens: int = 0
    losses: int = 0
    lost_in_recovery: int = 0
    kept: int = 0
    rescued: int = 0
    """Sequences on their way from the host when ranks were lost."""
    restarted: int = 0
    stopped: int = 0
    """Errors that ended an engine."""
    no_layout: int = 0
    killed: int = 0
    closes: int = 0
    changes: int = 0
    swapped: int = 0
    recomputed: int = 0
    phase_changes: int = 0

    def add(self, other: Tally) -> None:
        """Sum up."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, eq=False)
class _InFlight:
    """What an action touches until its completion has been taken in."""

    replica: Replica
    owner: object
    reads: frozenset[int]
    """Device blocks."""
    writes: frozenset[int]
    host_reads: frozenset[int] = frozenset()
    host_writes: frozenset[int] = frozenset()
    copy: bool = True
    touched: frozenset[int] = field(init=False)
    host: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.touched, self.host = self.reads | self.writes, self.host_reads | self.host_writes


@dataclass(slots=True)
class _Kept:
    """A sequence as it stood when ranks were lost."""

    sequence: Sequence
    tokens: list[int]
    whole: bool
    """Whether its KV was whole on the host."""
    cached: int
    blocks: list[int]


@dataclass(slots=True)
class Watch:
    """Watches one job, over all its engines."""

    tally: Tally = field(default_factory=Tally)
    log: list[str] | None = None
    """What happened, for a person to read."""
    trace: int = 0
    """A hash of all actions and completions."""
    lengths: list[int] = field(default_factory=list)
    """`max_model_len` of every plan so far."""
    actions: int = 0
    allowed: int = 0
    """Actions that may be needed so far."""
    work: int = 0
    """Tokens of all rows, prompts and outputs."""
    _engine: Engine | None = None
    _scheduler: Scheduler | None = None
    _deployment: Deployment | None = None
    _moved: bool = False
    """Whether there were actions since the last check."""
    _device: int = 0
    """Blocks of a replica's pool."""
    _tables: list[dict[int, tuple[object, list[int]]]] = field(default_factory=list)
    """Owner and blocks of each open slot, by replica."""
    _flying: dict[tuple[int, bool], list[_InFlight]] = field(default_factory=dict)
    """By action and whether its copies are meant."""
    _computed: dict[int, int] = field(default_factory=dict)
    """Positions of each sequence that have been computed, and not lost since."""
    _again: int = 0
    """Sequences that were computed again, and not because their KV was lost with its ranks."""
    _sources: dict[int, int] = field(default_factory=dict)
    """Replicas of the Forwards that ran under the present layout."""
    _kept: list[_Kept] | None = None
    """None unless ranks were lost a moment ago."""
    _queues: tuple[list[Sequence], list[Sequence]] = ([], [])
    """What waited, and what was on the host, when ranks were lost."""
    _survivors: list[object] = field(default_factory=list)
    _losses: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    """Who was lost under this engine, and how many sequences with them."""

    # ---- engines come and go ------------------------------------------------------------------------------

    def attach(self, engine: Engine) -> None:
        """Watch an engine that is about to run, on ranks and host memory of its own."""
        self._engine, self._scheduler = engine, engine._scheduler
        self._flying, self._computed, self._again = {}, {}, 0
        self._kept, self._losses = None, []
        complete = self._scheduler.complete

        def watched(completion: Completion) -> list[Sequence]:
            self._flying.pop((completion.id, isinstance(completion, CopiesDone)), None)
            updated = complete(completion)
            self.check()
            return updated

        self._scheduler.complete = watched  # type: ignore[method-assign]

    def detach(self) -> None:
        """The engine has ended, or was given up."""
        if self._scheduler is not None and self._engine is not None:
            losses = [(loss.ranks, loss.restarted) for loss in self._engine.stats().rank_losses]
            told = losses == self._losses[: len(losses)]
            hold(told, "recovery", f"the statistics say {losses} of {self._losses}")
            self.tally.losses += len(losses)
            self.tally.restarted += sum(restarted for _, restarted in losses)
            counters = self._scheduler.counters
            self.tally.swapped += counters.swapped_out
            self.tally.recomputed += counters.recomputed
            self.tally.phase_changes += counters.phase_changes
        self._engine = self._scheduler = self._deployment = None

    def note(self, what: str, detail: str) -> None:
        """Write down what happened."""
        self.trace = crc32(f"{what} {detail}".encode(), self.trace)
        if self.log is not None:
            self.log.append(f"{what}: {detail}")

    def layout(self, deployment: Deployment, phase: int) -> None:
        """New replicas, with pools and slots of their own."""
        self._deployment = deployment
        config = deployment.scheduler
        self._device = config.device_blocks[phase]
        self._sources = {}
        self._tables = [{} for _ in range(deployment.shardings[phase].layout.dp)]

    # ---- actions and completions --------------------------------------------------------------------------

    def submitted(self, action: Action) -> None:
        """Look at an action before it is carried out."""
        self.actions += 1
        self.tally.actions += 1
        self._moved = True
        self.trace = crc32(msgspec.msgpack.encode(action), self.trace)
        if self.log is not None:
            self.log.append(f"submit {action}")
        hold(self.actions <= self.allowed, "no livelock", f"{self.actions} actions")
        match action:
            case Forward():
                self._forward(action)
            case SwapOut() | SwapIn():
                self._swap(action)
            case Transition():
                pass

    def waiting(self) -> None:
        """All actions of a step have been submitted."""
        if self._moved:
            self.check()

    def delivered(self, completions: list[Completion]) -> None:
        """What the engine is about to be told."""
        self.trace = crc32(msgspec.msgpack.encode(completions), self.trace)
        if self.log is not None:
            self.log += [f"  done {completion}" for completion in completions]

    def check(self) -> None:
        """The books, and that nothing in flight touches what is free."""
        assert self._scheduler is not None
        self._moved = False
        with _books():
            check_integrity(self._scheduler)
        free_host = set(self._scheduler.host._free)
        free: dict[Replica, set[int]] = {}
        for flights in self._flying.values():
            for flight in flights:
                pool = free.get(flight.replica)
                if pool is None:
                    pool = free[flight.replica] = set(flight.replica.pool._free)
                hold(pool.isdisjoint(flight.touched), "in flight", "a device block was freed under it")
                hold(free_host.isdisjoint(flight.host), "in flight", "a host block was freed under it")

    # ---- Forwards -----------------------------------------------------------------------------------------

    def _forward(self, action: Forward) -> None:
        assert self._scheduler is not None and self._deployment is not None
        config, table = self._deployment.scheduler, self._tables[action.replica]
        flight = self._scheduler._flights[action.id]
        most = _most_tokens(self._deployment)
        hold(
            len(action.tokens) <= most,
            "budgets",
            f"a batch of {len(action.tokens)} tokens; {most} are set aside",
        )
        rows = len(action.sampled)
        hold(
            rows <= config.max_running,
            "budgets",
            f"logits of {rows} rows; {config.max_running} are set aside",
        )
        self._update_table(action, table)
        owners = dict(zip(action.slots, flight.sequences, strict=True))
        self._check_feedback(action)
        touched, written = [], []
        for slot, start, count in zip(action.slots, action.starts, action.counts, strict=True):
            hold(slot in table, "slots", f"slot {slot} is fed and not open")
            owner, blocks = table[slot]
            hold(owner is owners[slot], "slots", f"slot {slot} is fed with another sequence")
            end = -(-(start + count) // config.block_size)
            hold(len(blocks) >= end, "budgets", f"slot {slot} is fed past its blocks")
            first = start // config.block_size
            new = _InFlight(
                flight.replica, owner, frozenset(blocks[:first]), frozenset(blocks[first:end]), copy=False
            )
            touched.append(new)
            written += blocks[first:end]
            self._count_positions(owners[slot], start, count)
        hold(len(written) == len(set(written)), "one owner", f"Forward {action.id} writes a block twice")
        self._sources[action.id] = action.replica
        self._launch((action.id, False), touched)
        if action.write_through:
            device, host = zip(*action.write_through, strict=True)
            self._check_blocks(device, host)
            copy = _InFlight(
                flight.replica, action, frozenset(device), frozenset(), host_writes=frozenset(host)
            )
            self._launch((action.id, True), [copy])

    def _update_table(self, action: Forward, table: dict[int, tuple[object, list[int]]]) -> None:
        assert self._scheduler is not None and self._deployment is not None
        for slot in action.close:
            hold(table.pop(slot, None), "slots", f"slot {slot} is closed and not open")
        flight = self._scheduler._flights[action.id]
        owners = dict(zip(action.slots, flight.sequences, strict=True))
        for opened in action.open:
            hold(opened.slot not in table, "slots", f"slot {opened.slot} is opened twice")
            self._check_blocks(opened.blocks, ())
            many = opened.slot >= SLOTS * _most_tokens(self._deployment)
            hold(not many, "slots", f"slot {opened.slot} is opened, and most are never used again")
            table[opened.slot] = owners.get(opened.slot), list(opened.blocks)
        for slot, block in action.new_blocks:
            self._check_blocks((block,), ())
            table[slot][1].append(block)

    def _check_feedback(self, action: Forward) -> None:
        if FEEDBACK not in action.tokens:
            return
        hold(
            self._sources.get(action.feedback_from) == action.replica,
            "feedback",
            f"Forward {action.id} waits for {action.feedback_from}, which these ranks never had",
        )

    def _count_positions(self, sequence: Sequence, start: int, count: int) -> None:
        computed = self._computed.get(sequence.id, 0)
        if start != computed:
            hold(start == 0, "kept", f"positions {computed}.. are due and {start}.. are computed")
            self._again += 1
            assert self._scheduler is not None
            dropped = self._scheduler.counters.recomputed
            hold(self._again <= dropped, "kept", f"sequence {sequence.id} is computed again for no reason")
        self._computed[sequence.id] = start + count

    # ---- copies -------------------------------------------------------------------------------------------

    def _swap(self, action: SwapOut | SwapIn) -> None:
        assert self._scheduler is not None
        (sequence,) = self._scheduler._copies[action.id]
        hold(
            sequence.home is not None, "in flight", f"copy {action.id} is of a sequence that is on no device"
        )
        assert sequence.home is not None
        device, host = zip(*action.pairs, strict=True)
        self._check_blocks(device, host)
        out = isinstance(action, SwapOut)
        blocks, kept = frozenset(device), frozenset(host)
        self._launch(
            (action.id, True),
            [
                _InFlight(
                    sequence.home,
                    sequence,
                    reads=blocks if out else frozenset(),
                    writes=frozenset() if out else blocks,
                    host_reads=frozenset() if out else kept,
                    host_writes=kept if out else frozenset(),
                )
            ],
        )

    def _check_blocks(self, device: Iterable[int], host: Iterable[int]) -> None:
        assert self._deployment is not None
        most = self._deployment.memory.host_blocks
        hold(
            all(0 <= b < self._device for b in device), "budgets", f"device blocks {device} of {self._device}"
        )
        hold(all(0 <= b < most for b in host), "budgets", f"host blocks {host} of {most}")

    def _launch(self, key: tuple[int, bool], new: list[_InFlight]) -> None:
        """From now on these are in flight. Asserts that they race nothing that is."""
        for old in [flight for flights in self._flying.values() for flight in flights]:
            for flight in new:
                _check_race(old, flight)
        self._flying[key] = new

    # ---- losses -------------------------------------------------------------------------------------------

    def failing(self, error: EngineError) -> None:
        """Ranks are about to bring `error` up."""
        self.note("raise", str(error))
        self._flying.clear()
        if self._scheduler is None or not isinstance(error, WorkerError) or not error.lost:
            return
        assert self._deployment is not None
        self.tally.lost_in_recovery += error.phase == "startup"
        places = self._deployment.places
        self._survivors = [place for rank, place in enumerate(places) if rank not in error.lost]
        live = self._scheduler.live()
        self._queues = list(self._scheduler.waiting), list(self._scheduler.hosted)
        self.tally.rescued += sum(s.status is Status.SWAPPING_IN for s in live)
        self._kept = [
            _Kept(s, list(s.tokens), s.status in WHOLE, s.cached, list(s.host_blocks)) for s in live
        ]
        kept = {k.sequence.id for k in self._kept if k.whole}
        there = sum(s.status not in (Status.WAITING, Status.FINISHED, *WHOLE) for s in live)
        self._losses.append((error.lost, there))
        self._computed = {id: count for id, count in self._computed.items() if id in kept}

    def starting(
        self, before: Deployment | None, deployment: Deployment, host: Mapping[int, bytearray]
    ) -> None:
        """Ranks of `deployment` are about to start over `host`."""
        self._flying.clear()
        self._deployment = deployment
        self.lengths.append(deployment.memory.max_model_len)
        self.allowed += ACTIONS_PER_TOKEN * self.work
        if before is not None:
            same = deployment.memory.host_blocks == before.memory.host_blocks
            hold(same, "budgets", "the host buffer changes its size while it stands")
        if self._scheduler is None:
            return
        for sequence in self._scheduler.hosted:
            _check_host(sequence, deployment.scheduler.block_size, host)
        if self._kept is None:
            self.tally.changes += before is not None
            return
        for kept in self._kept:
            sequence = kept.sequence
            hold(sequence.tokens == kept.tokens, "kept", f"sequence {sequence.id} lost tokens")
            same = (sequence.cached, sequence.host_blocks) == (kept.cached, kept.blocks)
            stays = sequence.status is Status.HOST and same
            hold(stays or not kept.whole, "kept", f"sequence {sequence.id} lost its KV")
        self._check_queues(self._scheduler)
        self.tally.kept += sum(kept.whole for kept in self._kept)
        with _books():
            self._scheduler.host.check(
                [b for s in self._scheduler._sequences.values() for b in s.host_blocks]
            )
        self._kept = None
        assert before is not None
        self._check_places(before, deployment)

    def _check_queues(self, scheduler: Scheduler) -> None:
        for queue, before in zip((scheduler.waiting, scheduler.hosted), self._queues, strict=True):
            new, old = list(queue)[: len(queue) - len(before)], list(queue)[len(queue) - len(before) :]
            hold(old == before, "order", f"{[s.id for s in before]} became {[s.id for s in queue]}")
            ages = [s.id if queue is scheduler.waiting else s.admitted for s in new]
            hold(ages == sorted(ages), "order", f"the oldest of {[s.id for s in new]} does not come first")

    def _check_places(self, before: Deployment, deployment: Deployment) -> None:
        hold(before.options.on_rank_loss == "continue", "stops", "the job goes on where it was to stop")
        places = [id(place) for place in deployment.places]
        survivors = {id(place) for place in self._survivors}
        hold(len(places) == deployment.plan.world, "recovery", f"{len(places)} places for {deployment.plan}")
        hold(survivors.issuperset(places), "recovery", "a rank that was lost is started again")
        assert self._scheduler is not None
        longest = max((s.limit for s in self._scheduler.live()), default=1)
        used, tokens = len(places), before.memory.max_model_len
        if deployment.memory.max_model_len < tokens:
            hold(before.options.max_model_len is None, "recovery", "what was asked for no longer fits")
            hold(
                not fitting(before, len(survivors), tokens),
                "recovery",
                f"{deployment.plan} has less room than it could",
            )
            tokens = longest
        more = fitting(before, len(survivors), tokens, more_than=used)
        hold(not more, "recovery", f"{deployment.plan} runs where {more} ranks could")


def _most_tokens(deployment: Deployment) -> int:
    """Of one batch, for which memory is set aside."""
    return max(deployment.scheduler.max_batch_tokens, deployment.scheduler.max_running)


@contextmanager
def _books() -> Iterator[None]:
    """What is asserted in here is about the books."""
    try:
        yield
    except AssertionError as error:
        raise Violation("books", str(error)) from error


def _check_race(old: _InFlight, new: _InFlight) -> None:
    if old.replica is new.replica:
        if not old.copy and not new.copy:  # Forwards run in order; but a block changes hands only when idle
            shared = old.owner is not new.owner and old.touched & new.touched
            hold(not shared, "one owner", f"device blocks {shared}")
        elif old.copy or new.writes:  # a copy out runs after the Forwards that were submitted before it
            touched = new.writes & old.touched | old.writes & new.reads
            hold(not touched, "in flight", f"a race for device blocks {touched}")
    if old.host and new.host:
        touched = new.host_writes & old.host | old.host_writes & new.host_reads
        hold(not touched, "in flight", f"a race for host blocks {touched}")


def _check_host(sequence: Sequence, size: int, host: Mapping[int, bytearray]) -> None:
    found = b"".join([host.get(block, b"") for block in sequence.host_blocks])[: sequence.cached]
    hold(
        found == bytes(sequence.tokens[: sequence.cached]), "kept", f"the host has other KV of {sequence.id}"
    )
