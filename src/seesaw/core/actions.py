"""What the scheduler tells an executor to do, and what an executor reports back.

Actions of one replica are carried out in the order they were submitted; `SwapOut`, `SwapIn` and the
write-through copies of a `Forward` run beside computation, and their completion is reported on its own, in
any order. The `ForwardDone`s of one replica arrive in the order of their `Forward`s.
All are plain data (msgspec structs), so that they travel between processes as they are.

Block numbers: a device block is a number in the pool of a replica (each rank of the replica holds its own
slab of it); a host block is a number in the node's host buffer.
"""

from __future__ import annotations

import msgspec

FEEDBACK = -1
"""Stands in `Forward.tokens` for the token that an earlier, still unfinished `Forward` samples for the slot."""

PREFILL, DECODE = 0, 1
"""Indexes of the two shardings of a plan; a static plan has one layout and stays in `PREFILL`."""


class SamplingState(msgspec.Struct, array_like=True, frozen=True):
    """What the sampler must know of a sequence. `noise_key` (64 bit) and the token's index fix its noise."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    noise_key: int
    logprobs: int
    """Number of most likely tokens to report beside the chosen one; -1 for no log-probabilities."""
    min_tokens: int
    stop_token_ids: list[int]
    """Not sampled before `min_tokens` tokens; empty when `min_tokens` is 0."""
    generated: int
    """Tokens sampled before the slot was opened."""
    prompt: list[int]
    output: list[int]
    """Tokens seen so far; both are empty unless the sequence has penalties."""


class SlotInit(msgspec.Struct, array_like=True, frozen=True):
    """Opens a slot (a sequence's row in the workers' tables of a replica) with the device blocks it has.

    `sampling` is None for plain greedy choice without log-probabilities.
    """

    slot: int
    blocks: list[int]
    sampling: SamplingState | None


class PromptScore(msgspec.Struct, array_like=True, frozen=True):
    """Prompt tokens of an item of a `Forward` whose log-probabilities are wanted, each under what is before it.

    `tokens[j]` is the prompt's token behind number `first + j` of those the item feeds; the last one may be the first
    that a later `Forward` feeds, or one that none does.
    """

    item: int
    first: int
    tokens: list[int]
    top: int
    """Number of most likely tokens to report beside each of them."""


class Forward(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Run one micro-batch through a replica. Items are parallel lists, one entry per sequence.

    Item i feeds `counts[i]` tokens at positions `starts[i]…` of the sequence in `slots[i]`; `starts[i]` tokens
    of it are in the KV cache already. `tokens` is packed over the items.
    """

    id: int
    replica: int
    slots: list[int]
    starts: list[int]
    counts: list[int]
    tokens: list[int]
    sampled: list[int]
    """Indexes of the items after whose last token the next token is sampled."""
    open: list[SlotInit]
    close: list[int]
    """Slots to forget before anything else (a slot may be closed and opened by the same action)."""
    new_blocks: list[tuple[int, int]]
    """(slot, device block): appended to the slot's block table before running."""
    write_through: list[tuple[int, int]]
    """(device block, host block): copied out layer by layer behind the computation; reported by `CopiesDone`."""
    feedback: bool
    """Whether the sampled tokens are handed to the first stage for a following `Forward`."""
    feedback_from: int
    """Id of the latest `Forward` whose sampled tokens stand as FEEDBACK in `tokens`; -1 for none."""
    scores: list[PromptScore] = []

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step: one token of each sequence, and nothing written through or scored."""
        return len(self.tokens) == len(self.counts) and not self.write_through and not self.scores


class SwapOut(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Copy KV from device blocks of a replica to host blocks, after all earlier `Forward`s of the replica."""

    id: int
    replica: int
    pairs: list[tuple[int, int]]
    """(device block, host block)."""


class SwapIn(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Copy KV from host blocks to device blocks of a replica, beside computation."""

    id: int
    replica: int
    pairs: list[tuple[int, int]]
    """(device block, host block)."""


class Transition(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Change every rank to the sharding `target`. Unless both layouts are equal, all slots are closed first."""

    id: int
    target: int


Action = Forward | SwapOut | SwapIn | Transition


class ChosenToken(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities of one token, sampled or of a prompt: its own, its rank, and the most likely tokens
    (id, logprob)."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class ForwardDone(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A micro-batch left the last stage. `tokens[j]` was sampled for item `sampled[j]`."""

    id: int
    tokens: list[int]
    logprobs: list[ChosenToken | None]
    """Empty when no item asked for log-probabilities."""
    host_seconds: float = 0.0
    """Of the time the sampling rank had the action in hand, what went to anything but the model."""
    prompt_logprobs: list[ChosenToken] = []
    """Of the tokens of the Forward's `scores`, one after another."""


class CopiesDone(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """All ranks of the replica have finished the copies of a `SwapOut`, `SwapIn` or a write-through."""

    id: int
    bytes: int
    seconds: float


class TransitionDone(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """All ranks run under the new sharding."""

    id: int
    bytes: int
    """Fetched from the host store, summed over ranks."""
    seconds: float
    """From the first rank's start to the last rank's end."""
    copied: int = 0
    """Bytes that ranks had and copied to other places, summed over ranks."""
    moving: float = 0.0
    """Longest time that a rank spent fetching and copying."""


Completion = ForwardDone | CopiesDone | TransitionDone
