"""`BatchBuilder`: puts one `Forward` together and keeps the sequences' books while doing so."""

from __future__ import annotations

from dataclasses import dataclass, field

from seesaw.core.actions import FEEDBACK, Forward, PromptScore, SamplingState, SlotInit
from seesaw.core.noise import noise_key
from seesaw.scheduling.lockstep import Lockstep
from seesaw.scheduling.replica import Replica
from seesaw.scheduling.sequence import Sequence


def sampling_state(sequence: Sequence, engine_seed: int) -> SamplingState | None:
    """What the sampler must know of `sequence`, or None if it only ever takes the most likely token."""
    params = sequence.request.sampling
    if params.greedy and not params.penalises and params.logprobs is None and params.min_tokens == 0:
        return None
    penalised = params.penalises
    return SamplingState(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        noise_key=noise_key(engine_seed, sequence.request.id, sequence.index, params.seed),
        logprobs=-1 if params.logprobs is None else params.logprobs,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(sequence.stop_ids) if params.min_tokens else [],
        generated=sequence.generated,
        prompt=sequence.tokens[: sequence.prompt_tokens] if penalised else [],
        output=sequence.output_token_ids if penalised else [],
    )


@dataclass(slots=True)
class Flight:
    """A Forward in flight: what its completion must settle."""

    replica: Replica
    group: int
    tokens: int
    """That it feeds."""
    sequences: list[Sequence]
    sampled: list[Sequence]
    last: list[Sequence]
    """Those whose limit its token reaches."""
    stops: bool
    """Whether a token may end one of them."""
    scored: list[tuple[Sequence, int]]
    """Whose prompt's tokens are scored, and how many."""


@dataclass(slots=True)
class BatchBuilder:
    """Collects the items of one Forward for one micro-batch group of a replica."""

    id: int
    replica: Replica
    group: int
    seed: int
    feedback: bool
    """Whether later Forwards may use the sampled tokens before they have come back."""
    tokens_fed: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    _slots: list[int] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _sampled: list[int] = field(default_factory=list)
    _open: list[SlotInit] = field(default_factory=list)
    _new_blocks: list[tuple[int, int]] = field(default_factory=list)
    _write_through: list[tuple[int, int]] = field(default_factory=list)
    _copied: list[Sequence] = field(default_factory=list)
    _last: list[Sequence] = field(default_factory=list)
    _scores: list[PromptScore] = field(default_factory=list)
    _scored: list[tuple[Sequence, int]] = field(default_factory=list)
    _feedback_from: int = -1
    _stops: bool = False
    _closing: int = field(init=False)
    """Slots given up before this Forward was begun; later ones may be in it still."""

    def __post_init__(self) -> None:
        self._closing = len(self.replica.closing)

    def feed(self, sequence: Sequence, count: int) -> bool:
        """Add the next `count` tokens of a prompt; its device blocks exist already.

        Returns whether these were its last known tokens, so that the next one is sampled, if any is wanted.
        """
        start = sequence.cached
        self._tell_blocks(sequence)
        self._tokens.extend(sequence.tokens[start : start + count])
        last = start + count == len(sequence.tokens)
        if sequence.request.sampling.prompt_logprobs is not None:
            self._score(sequence, start, count)
        if last:
            self._stops = self._stops or bool(sequence.stop_ids)
            if not sequence.request.sampling.scores_only:
                self._sampled.append(len(self.sequences))
            if start + count + 1 >= sequence.limit:
                self._last.append(sequence)
        self.sequences.append(sequence)
        self._slots.append(sequence.slot)
        self._starts.append(start)
        self._counts.append(count)
        self.tokens_fed += count
        sequence.feed(count, self.id)
        return last

    def _score(self, sequence: Sequence, start: int, count: int) -> None:
        """Ask for the scores that the next `count` tokens give; not for those that an earlier prefill has given."""
        first = max(start + 1, sequence.first_score + len(sequence.prompt_logprobs))
        tokens = sequence.request.prompt_token_ids[first : start + count + 1]
        if tokens:
            top = sequence.request.sampling.prompt_logprobs or 0
            self._scores.append(PromptScore(len(self.sequences), first - 1 - start, list(tokens), top))
            self._scored.append((sequence, len(tokens)))

    def feed_all(self, lockstep: Lockstep, due: list[Sequence], last: list[Sequence]) -> None:
        """Add a decode step of each member; their device blocks exist already, and only those `due` have new ones.

        For those in `last` it is the last one.
        """
        for sequence in due:
            if sequence.untold and sequence.lockstep is not None:
                self._tell_blocks(sequence)
        running = lockstep.members
        old = 0 if lockstep.uneven else len(running) - lockstep.fresh
        if old and lockstep.latest > self.replica.completed:
            self._tokens.extend([FEEDBACK] * old)
            self._feedback_from = lockstep.latest
        else:
            self._tokens.extend([s.tokens[-1] for s in running[:old]])
        self._feed_tokens(running[old:])
        self._stops = self._stops or lockstep.stops
        self._last.extend(last)
        slots, starts = lockstep.columns()
        self._step(running, slots, starts)

    def feed_some(self, running: list[Sequence]) -> None:
        """Add a decode step of each of these sequences, which are in no lockstep; their device blocks exist."""
        for sequence in [s for s in running if s.untold]:
            self._tell_blocks(sequence)
        self._feed_tokens(running)
        self._stops = self._stops or any(s.stop_ids for s in running)
        self._last.extend([s for s in running if s.cached + 2 >= s.limit])
        self._step(running, [s.slot for s in running], [s.cached for s in running])
        for sequence in running:
            sequence.feed(1, self.id)

    def _feed_tokens(self, running: list[Sequence]) -> None:
        """The next token of each, if it has come back."""
        asked = [s.last_forward for s in running if s.cached >= len(s.tokens)]
        self._tokens.extend([s.tokens[s.cached] if s.cached < len(s.tokens) else FEEDBACK for s in running])
        self._feedback_from = max(self._feedback_from, *asked) if asked else self._feedback_from

    def _step(self, running: list[Sequence], slots: list[int], starts: list[int]) -> None:
        first, count = len(self.sequences), len(running)
        self._slots.extend(slots)
        self._starts.extend(starts)
        self._counts.extend([1] * count)
        self._sampled.extend(range(first, first + count))
        self.sequences.extend(running)
        self.tokens_fed += count

    def _tell_blocks(self, sequence: Sequence) -> None:
        if sequence.slot < 0:
            sequence.slot = self.replica.take_slot()
            state = sampling_state(sequence, self.seed)
            self._open.append(SlotInit(sequence.slot, list(sequence.device_blocks), state))
        else:
            for block in sequence.device_blocks[sequence.known_blocks :]:
                self._new_blocks.append((sequence.slot, block))
        sequence.known_blocks = len(sequence.device_blocks)
        sequence.untold = False

    def write_through(self, sequence: Sequence, blocks: int) -> None:
        """Copy the sequence's blocks up to number `blocks` to its host blocks behind this Forward."""
        first = sequence.written_through
        if blocks > first:
            device, host = sequence.device_blocks[first:blocks], sequence.host_blocks[first:blocks]
            self._write_through.extend(zip(device, host, strict=True))
            self._copied.append(sequence)
            sequence.written_through = blocks
            sequence.copies += 1

    def build(self) -> tuple[Forward, Flight, list[Sequence]]:
        """The action, what its completion settles, and the sequences with write-through copies in it."""
        closing = self.replica.closing[: self._closing]
        self.replica.slots_closed(self._closing)
        self.replica.in_flight += 1
        self.replica.tokens_in_flight += self.tokens_fed
        self.replica.groups[self.group].in_flight += 1
        forward = Forward(
            id=self.id,
            replica=self.replica.index,
            slots=self._slots,
            starts=self._starts,
            counts=self._counts,
            tokens=self._tokens,
            sampled=self._sampled,
            open=self._open,
            close=closing,
            new_blocks=self._new_blocks,
            write_through=self._write_through,
            feedback=self.feedback and bool(self._sampled),
            feedback_from=self._feedback_from,
            scores=self._scores,
        )
        everyone = self.sequences
        sampled = everyone if len(self._sampled) == len(everyone) else [everyone[i] for i in self._sampled]
        flight = Flight(
            self.replica,
            self.group,
            self.tokens_fed,
            everyone,
            sampled,
            self._last,
            self._stops,
            self._scored,
        )
        return forward, flight, self._copied
