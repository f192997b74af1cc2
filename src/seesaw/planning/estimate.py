"""What a job takes under a plan, in closed form: bulk at a full batch, and the batch thinning out at each end.

Two phases: the job goes round as often as its prompts fill the host buffer. Each round prefills, turns, decodes at a
full batch while the buffer refills it, and thins out until the scheduler turns back; the last one runs to its end.
Static plans: every Forward carries the decode steps of a micro-batch and, while prompts are left, what is needed of
them to replace the sequences that end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from seesaw.planning.pace import Pace
from seesaw.planning.statistics import Statistics
from seesaw.scheduling.config import TurnCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds of the whole job by phase; of static plans, everything is in `decode_seconds`."""

    prefill_seconds: float
    decode_seconds: float
    transition_seconds: float
    transitions: int
    batch: float
    """Sequences that decode at once on the node, where there are enough."""

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return self.prefill_seconds + self.decode_seconds + self.transition_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What memory leaves: tokens of KV on one replica of the decode layout and in the host buffer, and most
    sequences of a replica."""

    device: float
    host: float
    sequences: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What moving costs: bytes per second of the node, bytes of KV of a token, seconds of one transition."""

    to_host: float
    to_device: float
    kv_bytes: float
    transition: float


def two_phases(
    prefill: Pace, decode: Pace, room: Room, traffic: Traffic, costs: TurnCosts, *, chunk: int, groups: int
) -> Estimate:
    """Of a plan whose phases are separated in time, under policy `seesaw`."""
    of, replicas = decode.of, decode.layout.dp
    rounds = max(1, ceil(of.requests * of.hosted / room.host))
    per_round = of.requests / rounds
    batch = max(1.0, min(per_round, replicas * min(room.sequences, room.device / of.held)))
    each = max(1.0, batch / replicas)
    survival = of.fresh if per_round <= 1.5 * batch else of.running
    partial = survival.until(_refill(of, room, costs, batch))
    thinning = (rounds - 1) * decode.thinning(each, partial, groups) + decode.thinning(each, survival, groups)
    thinned = batch * ((rounds - 1) * partial.tokens + survival.tokens)
    bulk = max(0.0, of.requests * of.steps - thinned) / batch * decode.step(each, groups)
    moved = of.requests * of.hosted * traffic.kv_bytes
    first = 0.5 * batch * of.running_prompt * traffic.kv_bytes / traffic.to_device
    per_token, fill = prefill.prefill(chunk)
    turns = prefill.layout != decode.layout and of.hosted > 0
    transitions = (2 * rounds - 1) * turns
    return Estimate(
        prefill_seconds=max(of.requests * of.prompt * per_token, moved / traffic.to_host) + rounds * fill,
        decode_seconds=max(thinning + bulk, moved / traffic.to_device) + rounds * first,
        transition_seconds=transitions * traffic.transition,
        transitions=transitions,
        batch=batch,
    )


def _refill(of: Statistics, room: Room, costs: TurnCosts, sequences: float) -> float:
    """Share of the largest batch at which the scheduler turns back (`PhasedPolicy`)."""
    swap = costs.block * of.context / room.block_size
    each = swap + costs.turn * of.context / max(of.context, room.host - sequences * of.context)
    return 1 / (1 + sequences * each / (of.output * costs.step))


def static(pace: Pace, room: Room, *, chunk: int, groups: int) -> Estimate:
    """Of a plan with one layout, whose batches mix both phases."""
    of, replicas = pace.of, pace.layout.dp
    batch = max(1.0, min(of.requests, replicas * min(room.sequences, room.device / of.held)))
    if of.steps > 0:  # more sequences than their prompts can be fed for would not be reached
        batch = min(batch, max(1.0, replicas * groups * chunk / (1 + of.prompt / of.steps)))
    each = max(1.0, batch / replicas)
    survival = of.fresh if of.requests <= 1.5 * batch else of.running
    steady = max(0.0, of.requests * of.steps - batch * survival.tokens)
    seconds, begun = 0.0, float(of.requests)  # requests whose prompts do not replace another that ended
    if steady:
        seconds = steady / batch * _cycle(pace, of, each, chunk, groups)
        begun -= steady / of.steps
    per_token, fill = pace.prefill(chunk)
    seconds += begun * of.prompt * per_token + fill + pace.thinning(each, survival, groups)
    return Estimate(
        prefill_seconds=0.0, decode_seconds=seconds, transition_seconds=0.0, transitions=0, batch=batch
    )


def _cycle(pace: Pace, of: Statistics, sequences: float, chunk: int, groups: int) -> float:
    """Seconds in which each sequence of a replica decodes one token, and those that end are replaced."""
    ending = sequences / groups / of.steps  # sequences of a micro-batch that end with a Forward
    prompts = ending * of.prompt
    if ending >= 1 or prompts >= chunk:
        return pace.mixed(sequences, groups * prompts, groups)
    lump = min(of.prompt, chunk)
    share = prompts / lump  # of the Forwards carry a prompt, or a chunk of one
    # In a pipeline a Forward with a prompt holds up the micro-batches behind it in every stage.
    held = 1 - (1 - share) ** groups
    carrying = pace.lumpy(sequences, lump, groups, groups * share / held)
    return held * carrying + (1 - held) * pace.step(sequences, groups)
