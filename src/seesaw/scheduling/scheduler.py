"""`Scheduler`: the deterministic state machine between requests and an executor.

Requests and completions go in, actions come out. It owns every block of both KV tiers and reads neither a
clock nor a random source, so the same input gives the same actions. What is done when is a policy's
decision (`scheduling.policies`); what may be done, and what follows from it, is written here once.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from seesaw.core.actions import (
    DECODE,
    PREFILL,
    Action,
    Completion,
    CopiesDone,
    ForwardDone,
    SwapIn,
    SwapOut,
    Transition,
    TransitionDone,
)
from seesaw.core.errors import RequestError
from seesaw.core.request import FinishReason, Request
from seesaw.scheduling.batch import BatchBuilder, Flight
from seesaw.scheduling.blocks import BlockPool
from seesaw.scheduling.config import SchedulerConfig
from seesaw.scheduling.counters import Counters
from seesaw.scheduling.replica import Replica
from seesaw.scheduling.sequence import Sequence, Status

if TYPE_CHECKING:
    from seesaw.scheduling.policies.base import Policy


class Scheduler:
    """Requests and completions in, actions out.

    `policy` is called by `schedule` and uses the methods under "moves"; it reads the public fields and
    writes none of them.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self.phase = PREFILL
        self.replicas = self._make_replicas(PREFILL)
        self.host = BlockPool(config.host_blocks)
        self.waiting: deque[Sequence] = deque()
        self.hosted: deque[Sequence] = deque()
        """Sequences whose KV is whole on the host and who want a device, next one first."""
        self.swapping_out = 0
        """Sequences in status SWAPPING_OUT."""
        self.more_expected = True
        """Whether the source of requests may have more; set by the engine."""
        self.counters = Counters()
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._next_sequence = 0
        self._flights: dict[int, Flight] = {}
        self._copies: dict[int, list[Sequence]] = {}
        self._transitions: set[int] = set()
        self._actions: list[Action] = []
        self._finished: list[Sequence] = []

    def _make_replicas(self, phase: int) -> list[Replica]:
        config = self.config
        layout = (config.plan.prefill, config.plan.decode)[phase]
        return [
            Replica(
                index=i,
                blocks=config.device_blocks[phase],
                block_size=config.block_size,
                groups=config.groups(phase),
                max_running=config.max_running,
            )
            for i in range(layout.dp)
        ]

    # ---- requests in, results out -------------------------------------------------------------------------

    def add(self, request: Request, stop_ids: frozenset[int]) -> list[Sequence]:
        """Take a request in; returns its `n` sequences. `stop_ids` end a sequence when generated.

        Raises `RequestError` if the prompt is empty or can never fit.
        """
        _check_length(request, self.config.max_model_len)
        sequences = [self._new_sequence(request, i, stop_ids) for i in range(request.sampling.n)]
        self.waiting.extend(sequences)
        return sequences

    def _new_sequence(self, request: Request, index: int, stop_ids: frozenset[int]) -> Sequence:
        # the last token of a prompt that is only scored tells nothing of the others
        only = request.sampling.scores_only
        tokens = list(request.prompt_token_ids[:-1] if only else request.prompt_token_ids)
        sequence = Sequence(
            id=self._next_sequence,
            request=request,
            index=index,
            tokens=tokens,
            prompt_tokens=len(tokens),
            limit=min(len(tokens) + max(1, request.sampling.max_tokens), self.config.max_model_len),
            stop_ids=stop_ids,
        )
        self._next_sequence += 1
        self._sequences[sequence.id] = sequence
        return sequence

    @property
    def unfinished(self) -> int:
        """Sequences that have not ended, and ended ones that still hold blocks."""
        return len(self._sequences)

    @property
    def in_flight(self) -> int:
        """Actions whose completion is outstanding."""
        return len(self._flights) + len(self._copies) + len(self._transitions)

    @property
    def wants_requests(self) -> bool:
        """Whether the engine should add more requests before it calls `schedule`."""
        return len(self.waiting) < 2 * self.config.max_running * len(self.replicas) + 64

    def live(self) -> list[Sequence]:
        """Sequences that have not ended."""
        return [s for s in self._sequences.values() if s.status is not Status.FINISHED]

    def take_finished(self) -> list[Sequence]:
        """Sequences that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a sequence now, wherever it is; its blocks are freed once nothing in flight touches them."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.HOST:
            self.hosted.remove(sequence)
        elif sequence.status is Status.SWAPPING_OUT:
            self.swapping_out -= 1
        self._leave(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.counters.finish(sequence)
        self._finished.append(sequence)
        self._settle(sequence)

    # ---- the loop -----------------------------------------------------------------------------------------

    def schedule(self) -> list[Action]:
        """The actions to submit now, in order. May be empty while completions are outstanding."""
        self.policy.schedule(self)
        actions, self._actions = self._actions, []
        return actions

    def retire(self) -> list[Action]:
        """The actions that take every sequence off its device. Once all that is in flight has come back, and without
        a call of `schedule` before, `reconfigure` may follow."""
        self.park_all()
        actions, self._actions = self._actions, []
        return actions

    def lose_devices(self) -> int:
        """All ranks have ended, and with them what was in flight and the KV on their devices; `reconfigure` follows.

        A sequence whose KV is whole on the host stays there. All others wait again, the oldest first, to be computed
        from the tokens that they have. Returns how many had been computed, or were to be.
        """
        self._flights.clear()
        self._copies.clear()
        self._transitions.clear()
        self._actions.clear()
        self.swapping_out = 0
        touched = [s for s in self._sequences.values() if s.status not in (Status.WAITING, Status.HOST)]
        arriving = [s for s in touched if s.status is Status.SWAPPING_IN]
        again = [s for s in touched if s.status not in (Status.SWAPPING_IN, Status.FINISHED)]
        for sequence in touched:
            sequence.off_device()
            if sequence.status is Status.SWAPPING_IN:
                sequence.status = Status.HOST  # a swap-in only reads the host's blocks
                continue
            self._release_host(sequence)
            if sequence.status is Status.FINISHED:
                del self._sequences[sequence.id]
            else:
                sequence.cached = 0
                sequence.status = Status.WAITING
        self.hosted.extendleft(sorted(arriving, key=lambda s: -s.admitted))
        self.waiting.extendleft(sorted(again, key=lambda s: -s.id))
        return len(again)

    def reconfigure(self, config: SchedulerConfig, policy: Policy) -> None:
        """Go on under another plan, on new ranks over the same host buffer, beginning with its first phase.

        Nothing is in flight: sequences wait, or their KV is whole on the host. The plan must have room for them all.
        """
        assert not self.in_flight and not self._actions, "a plan is changed while something is in flight"
        assert all(s.status in (Status.WAITING, Status.HOST) for s in self._sequences.values())
        assert all(s.limit <= config.max_model_len for s in self._sequences.values())
        if config.host_blocks != self.host.total or config.block_size != self.config.block_size:
            assert self.host.used == 0, "the host buffer cannot change while it holds sequences"
            self.host = BlockPool(config.host_blocks)
        self.config, self.policy = config, policy
        self.phase = PREFILL
        self.replicas = self._make_replicas(PREFILL)

    def complete(self, completion: Completion) -> list[Sequence]:
        """Take a completion in; returns the sequences that got a token (one each), ended or not."""
        match completion:
            case ForwardDone():
                return self._forward_done(completion)
            case CopiesDone():
                for sequence in self._copies.pop(completion.id):
                    sequence.copies -= 1
                    self._settle(sequence)
            case TransitionDone():
                self._transitions.remove(completion.id)
        return []

    def _forward_done(self, done: ForwardDone) -> list[Sequence]:
        flight = self._flights.pop(done.id)
        replica = flight.replica
        replica.in_flight -= 1
        replica.tokens_in_flight -= flight.tokens
        replica.completed = done.id
        replica.groups[flight.group].in_flight -= 1
        place = 0
        for sequence, count in flight.scored:
            sequence.prompt_logprobs += done.prompt_logprobs[place : place + count]
            place += count
        assert place == len(done.prompt_logprobs)
        if done.logprobs:
            for sequence, chosen in zip(flight.sampled, done.logprobs, strict=True):
                if chosen is not None and sequence.status is not Status.FINISHED:
                    sequence.logprobs.append(chosen)
        # Who has left keeps blocks while in flight. Who ends by the token that has come is settled there and then.
        leaving = [s for s in flight.sequences if s.group < 0] if replica.leaving_blocks else []
        updated = self._append(flight, done.tokens)
        for sequence in leaving:
            self._settle(sequence)
        return updated

    def _append(self, flight: Flight, tokens: list[int]) -> list[Sequence]:
        """Append a token to each sequence that has not ended, and end those that it ends."""
        sampled = flight.sampled
        if flight.replica.leaving_blocks:  # else none has
            finished = Status.FINISHED
            pairs = [(s, t) for s, t in zip(sampled, tokens, strict=True) if s.status is not finished]
            sampled, tokens = [s for s, _ in pairs], [t for _, t in pairs]
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.tokens.append(token)
        if flight.stops:
            for sequence, token in zip(sampled, tokens, strict=True):
                if token in sequence.stop_ids and sequence.generated > sequence.request.sampling.min_tokens:
                    named = token if token in sequence.request.sampling.stop_token_ids else None
                    self.finish(sequence, "stop", named)
        for sequence in flight.last:
            self.finish(sequence, "length")  # unless it has ended
        return sampled

    def _settle(self, sequence: Sequence) -> None:
        """Move a sequence on, once nothing in flight touches it."""
        if not sequence.idle:
            return
        if sequence.status is Status.FINISHED:
            self._release_device(sequence)
            self._release_host(sequence)
            self._sequences.pop(sequence.id, None)
        elif sequence.status is Status.DROPPING:
            self._release_device(sequence)
            self._release_host(sequence)
            sequence.cached = sequence.written_through = 0
            sequence.status = Status.WAITING
            self.waiting.appendleft(sequence)
        elif sequence.status is Status.SWAPPING_OUT:
            self._arrive_on_host(sequence)
        elif sequence.status is Status.SWAPPING_IN:
            self._release_host(sequence)
            self._decode(sequence)

    def _arrive_on_host(self, sequence: Sequence) -> None:
        self._release_device(sequence)
        self.swapping_out -= 1
        sequence.status = Status.HOST
        if sequence.generated > 1:
            self.hosted.appendleft(sequence)
        else:
            self.hosted.append(sequence)

    # ---- moves: what a policy may do ----------------------------------------------------------------------

    def reserve(self, replica: Replica) -> int:
        """Device blocks that the residents of `replica` are expected to grow by."""
        return replica.growth(self.counters.mean_output)

    def has_room(self, replica: Replica, tokens: int, *, reserved: int) -> bool:
        """Whether a sequence of `tokens` tokens may join and leave `reserved` blocks to the residents."""
        if replica.resident >= replica.max_running:
            return False
        return replica.pool.free - self.config.blocks(tokens) >= reserved

    def admit(self, sequence: Sequence, replica: Replica, group: int, *, via_host: bool) -> None:
        """Begin prefill of the sequence at the head of `waiting`: it joins the micro-batch `group` and gets
        device blocks for all its tokens.

        `via_host`: it leaves for the host buffer when prefilled, so it gets host blocks as well.
        """
        popped = self.waiting.popleft()
        assert popped is sequence
        blocks = self.config.blocks(len(sequence.tokens))
        self._enter(sequence, replica, group, blocks)
        sequence.status = Status.PREFILLING
        replica.groups[group].prefilling[sequence.id] = sequence
        if via_host:
            sequence.host_blocks = self.host.allocate(blocks)

    def swap_in(self, sequence: Sequence, replica: Replica) -> None:
        """Bring the sequence at the head of `hosted` to a device."""
        popped = self.hosted.popleft()
        assert popped is sequence
        self._enter(sequence, replica, replica.smallest_group(), len(sequence.host_blocks))
        sequence.status = Status.SWAPPING_IN
        pairs = list(zip(sequence.device_blocks, sequence.host_blocks, strict=True))
        self._copy(sequence, SwapIn(self._new_id(), replica.index, pairs))

    def park(self, sequence: Sequence) -> None:
        """Take a running sequence off its device: to the host if it has room, else to be recomputed."""
        assert sequence.status is Status.RUNNING and sequence.home is not None
        replica, blocks = sequence.home, self.config.blocks(sequence.cached)
        self._leave(sequence)
        if self.host.free >= blocks:
            sequence.host_blocks = self.host.allocate(blocks)
            sequence.status = Status.SWAPPING_OUT
            self.swapping_out += 1
            self.counters.swapped_out += 1
            pairs = list(zip(sequence.device_blocks[:blocks], sequence.host_blocks, strict=True))
            self._copy(sequence, SwapOut(self._new_id(), replica.index, pairs))
        else:
            sequence.status = Status.DROPPING
            self.counters.recomputed += 1
            self._settle(sequence)

    def park_all(self) -> None:
        """Park everything that runs, the youngest first."""
        for replica in self.replicas:
            for sequence in replica.youngest():
                self.park(sequence)

    def transition(self, phase: int) -> None:
        """Go over to the other phase; every sequence has left the devices, or is on its way."""
        assert phase in (PREFILL, DECODE) and phase != self.phase
        self.phase = phase
        self.counters.phase_changes += 1
        if self.config.plan.reshards:
            assert all(replica.resident == 0 for replica in self.replicas)
            self.replicas = self._make_replicas(phase)
            action = Transition(self._new_id(), phase)
            self._transitions.add(action.id)
            self._actions.append(action)

    def batch(self, replica: Replica, group: int, *, feedback: bool) -> BatchBuilder:
        """Begin a Forward; give it to `submit` when it is filled."""
        return BatchBuilder(self._new_id(), replica, group, self.config.seed, feedback)

    def submit(self, batch: BatchBuilder) -> None:
        """Emit the Forward of `batch`; an empty one is dropped."""
        if not batch.sequences:
            return
        forward, flight, copied = batch.build()
        self._flights[forward.id] = flight
        if forward.write_through:
            self._copies[forward.id] = copied
        self._actions.append(forward)

    def prefilled(self, sequence: Sequence) -> None:
        """All tokens of a sequence have been fed: it decodes where it is, or leaves for the host buffer."""
        assert sequence.status is Status.PREFILLING
        if sequence.home is not None and not self.config.plan.separate:
            del sequence.home.groups[sequence.group].prefilling[sequence.id]
            self._decode(sequence)
            return
        self._leave(sequence)
        if sequence.host_blocks:
            sequence.status = Status.SWAPPING_OUT
            self.swapping_out += 1

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token of `sequence` has a device block; False if none is free."""
        assert sequence.home is not None
        return sequence.cached < sequence.capacity or sequence.home.grow(sequence)

    # ---- bookkeeping --------------------------------------------------------------------------------------

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _copy(self, sequence: Sequence, action: SwapIn | SwapOut) -> None:
        sequence.copies += 1
        self._copies[action.id] = [sequence]
        self._actions.append(action)

    def _decode(self, sequence: Sequence) -> None:
        """From now on it takes a token at every step of its group."""
        assert sequence.home is not None
        sequence.status = Status.RUNNING
        sequence.home.groups[sequence.group].lockstep.add(sequence)

    def _enter(self, sequence: Sequence, replica: Replica, group: int, blocks: int) -> None:
        replica.join(sequence, group, blocks)
        sequence.admitted = self._new_id()

    def _leave(self, sequence: Sequence) -> None:
        """Give up place and slot; the blocks stay owned until the sequence is idle."""
        if sequence.home is not None and sequence.group >= 0:
            sequence.home.leave(sequence)

    def _release_device(self, sequence: Sequence) -> None:
        if sequence.home is not None:
            sequence.home.release(sequence)

    def _release_host(self, sequence: Sequence) -> None:
        self.host.release(sequence.host_blocks)
        sequence.host_blocks = []
        sequence.written_through = 0


def _check_length(request: Request, longest: int) -> None:
    """Raise `RequestError` if the prompt is empty, or can never fit where sequences have at most `longest` tokens."""
    prompt, only = len(request.prompt_token_ids), request.sampling.scores_only
    if prompt == 0:
        raise RequestError("the prompt is empty", code="empty_prompt", param="prompt")
    if only and prompt == 1:
        raise RequestError(
            "a prompt of one token has nothing to score; give two at least, or a max_tokens of 1",
            code="prompt_too_short",
            param="prompt",
        )
    most = longest + 1 if only else longest - 1
    if prompt > most:
        why = "the last of them is not fed" if only else "one token at least is generated"
        raise RequestError(
            f"the prompt has {prompt} tokens; at most {most} fit, since max_model_len is {longest} and {why}",
            code="context_length_exceeded",
            param="prompt",
        )
