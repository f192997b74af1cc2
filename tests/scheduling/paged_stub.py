"""An executor for tests: real paged memory, a toy model whose next token is a function of the whole prefix.

Any mix-up of blocks, any copy that races a Forward, any stale token changes the prefix that is read back, and
so a token. Forwards run in order per replica; copies run, and completions arrive, at random moments within
what `core.actions` promises.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

from seesaw.core.actions import (
    FEEDBACK,
    Action,
    ChosenToken,
    Completion,
    CopiesDone,
    Forward,
    ForwardDone,
    SwapIn,
    SwapOut,
    Transition,
    TransitionDone,
)

VOCAB = 97


def next_token(prefix: list[int]) -> int:
    """The toy model: depends on every token of the prefix and on its length."""
    state = len(prefix)
    for token in prefix:
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
    return state % VOCAB


def score(prefix: list[int], token: int) -> ChosenToken:
    """What the toy model says of a prompt's token behind `prefix`."""
    return ChosenToken(-float(next_token(prefix)), token + 1, [])


def expected(prompt: list[int], limit: int, stops: frozenset[int]) -> list[int]:
    """What the toy model generates after `prompt`, up to `limit` tokens in all."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


@dataclass
class _Slot:
    blocks: list[int]
    last: int | None = None
    sampled_by: int = -1


@dataclass
class _Copy:
    id: int
    pairs: list[tuple[int, int]]
    out: bool
    replica: int
    epoch: int
    after: int
    """Forwards of the replica that must have run before (swap-out only)."""


@dataclass
class PagedStub:
    """Executes actions on paged token memory; `step` does one random thing and may return a completion."""

    block_size: int
    rng: random.Random
    host: dict[int, list[int | None]] = field(default_factory=dict)
    epoch: int = 0

    def __post_init__(self) -> None:
        self._device: dict[tuple[int, int], dict[int, list[int | None]]] = defaultdict(dict)
        self._slots: dict[tuple[int, int], dict[int, _Slot]] = defaultdict(dict)
        self._queues: dict[tuple[int, int], deque[Forward]] = defaultdict(deque)
        self._submitted: dict[tuple[int, int], int] = defaultdict(int)
        self._ran: dict[tuple[int, int], int] = defaultdict(int)
        self._copies: list[_Copy] = []
        self._done: dict[tuple[int, int], deque[Completion]] = defaultdict(deque)
        self._transitioned: list[Completion] = []
        self.actions = 0

    @property
    def busy(self) -> bool:
        """Whether anything is outstanding."""
        return bool(
            self._copies or self._transitioned or any(self._done.values()) or any(self._queues.values())
        )

    def submit(self, action: Action) -> None:
        """Take an action in."""
        self.actions += 1
        match action:
            case Forward():
                key = (self.epoch, action.replica)
                self._queues[key].append(action)
                self._submitted[key] += 1
            case SwapOut() | SwapIn():
                key = (self.epoch, action.replica)
                out = isinstance(action, SwapOut)
                after = self._submitted[key] if out else 0
                self._copies.append(_Copy(action.id, action.pairs, out, action.replica, self.epoch, after))
            case Transition():
                self.epoch += 1
                self._transitioned.append(TransitionDone(action.id, 0, 0.0))

    def step(self) -> Completion | None:
        """Run one Forward, finish one copy, or deliver one completion, at random."""
        queues = [key for key, queue in self._queues.items() if queue]
        copies = [c for c in self._copies if not c.out or self._ran[(c.epoch, c.replica)] >= c.after]
        choices = [("run", q) for q in queues] + [("copy", c) for c in copies]
        choices += [("done", d) for d in (*self._done.values(), self._transitioned) if d]
        if not choices:
            return None
        kind, what = self.rng.choice(choices)
        if kind == "run":
            self._run(what, self._queues[what].popleft())
        elif kind == "copy":
            self._copies.remove(what)
            self._copy(what)
            return CopiesDone(what.id, 0, 0.0)
        else:
            return what.popleft() if isinstance(what, deque) else what.pop()
        return None

    def _run(self, key: tuple[int, int], forward: Forward) -> None:
        slots, device = self._slots[key], self._device[key]
        for slot in forward.close:
            del slots[slot]
        for opened in forward.open:
            assert opened.slot not in slots, "slot opened twice"
            slots[opened.slot] = _Slot(list(opened.blocks))
        for slot, block in forward.new_blocks:
            slots[slot].blocks.append(block)
        assert len(set(forward.slots)) == len(forward.slots)
        tokens, at, results = list(forward.tokens), 0, []
        for i, number in enumerate(forward.slots):
            slot = slots[number]
            for j in range(forward.counts[i]):
                token = tokens[at]
                if token == FEEDBACK:
                    assert slot.last is not None and slot.sampled_by <= forward.feedback_from
                    token = slot.last
                self._write(device, slot, forward.starts[i] + j, token)
                at += 1
            if i in forward.sampled:
                prefix = self._read(device, slot, forward.starts[i] + forward.counts[i])
                slot.last, slot.sampled_by = next_token(prefix), forward.id
                results.append(slot.last)
        scores = [
            score(
                self._read(device, slots[forward.slots[s.item]], forward.starts[s.item] + s.first + j + 1),
                token,
            )
            for s in forward.scores
            for j, token in enumerate(s.tokens)
        ]
        self._ran[key] += 1
        self._done[key].append(ForwardDone(forward.id, results, [], prompt_logprobs=scores))
        if forward.write_through:
            epoch, replica = key
            self._copies.append(
                _Copy(forward.id, forward.write_through, True, replica, epoch, self._ran[key])
            )

    def _write(self, device: dict[int, list[int | None]], slot: _Slot, position: int, token: int) -> None:
        block = slot.blocks[position // self.block_size]
        page = device.setdefault(block, [None] * self.block_size)
        page[position % self.block_size] = token

    def _read(self, device: dict[int, list[int | None]], slot: _Slot, length: int) -> list[int]:
        prefix = [device[slot.blocks[p // self.block_size]][p % self.block_size] for p in range(length)]
        assert None not in prefix, "read KV that was never written"
        return prefix  # type: ignore[return-value]

    def _copy(self, copy: _Copy) -> None:
        device = self._device[(copy.epoch, copy.replica)]
        for device_block, host_block in copy.pairs:
            if copy.out:
                self.host[host_block] = list(device[device_block])
            else:
                device[device_block] = list(self.host[host_block])
