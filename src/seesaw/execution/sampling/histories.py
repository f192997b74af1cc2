"""Which tokens a sequence has seen, on the device: what penalties need, advanced there by each sampled token.

A sequence's history is a log: an entry for each distinct token of prompt and output when the slot is opened, then one
for each token it samples, new or not. An entry holds how often its token occurs in the output, and entries of one
token agree on that, so that each of them may penalise its logit. The host knows how long a log is without knowing
what is in it.

Logs are kept in pages, as KV is in blocks. What a page has beyond the end of its log repeats the last entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seesaw.execution.sampling.rows import Ints, Rows, Uploads, ranges

if TYPE_CHECKING:
    from seesaw.device.base import Device

PAGE = 64
"""Entries of a page, 8 bytes each."""
_AT_ONCE = 1 << 12
"""Pages that are looked at in one operation, so that temporaries stay small: some 8 MiB."""
_LEAST = 64
"""Pages that there is memory for at first."""

_Array = npt.NDArray[Any]
_Later = Callable[[], Tensor]


class _Arena:
    """Memory of the pages: tokens int32, and their counts in the output, exact in float32; both [pages, PAGE]."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((0, PAGE), dtype=torch.int32, device=device)
        self.counts = torch.zeros((0, PAGE), dtype=torch.float32, device=device)

    def grow(self, pages: int) -> None:
        """Have room for so many pages."""
        held = len(self.tokens)
        if pages > held:
            more = max(_LEAST, held, pages - held)
            self.tokens = torch.cat([self.tokens, self.tokens.new_zeros((more, PAGE))])
            self.counts = torch.cat([self.counts, self.counts.new_zeros((more, PAGE))])


@dataclass(slots=True)
class _Log:
    """Of one slot: `size` entries in `pages`."""

    size: int
    pages: list[int]


class Histories:
    """The logs of the open slots whose sequences have penalties."""

    def __init__(self, vocab: int, device: Device) -> None:
        self._vocab = vocab
        self._arena = _Arena(device.torch)
        self._logs: dict[int, _Log] = {}
        self._unwritten: dict[int, tuple[_Array, _Array]] = {}
        """Tokens and counts of slots opened since the last call."""
        self._free: list[int] = []
        self._made = 0

    def open(self, slot: int, prompt: list[int], output: list[int]) -> None:
        """Begin a log with the tokens seen so far. It goes to the device with the next call."""
        tokens = np.unique(np.asarray(prompt + output, dtype=np.int64))
        counts = np.zeros(len(tokens), dtype=np.float32)
        if output:
            counts += np.bincount(np.searchsorted(tokens, output), minlength=len(tokens))
        # Ids beyond the logits (a padded embedding) cannot be sampled, so there is nothing to penalise.
        size = int(np.searchsorted(tokens, self._vocab))
        pages = [self._take() for _ in range(-(-size // PAGE))]
        self._logs[slot] = _Log(size, pages)
        if size:
            # what a page has beyond the end repeats the last entry
            places = np.minimum(np.arange(len(pages) * PAGE), size - 1)
            self._unwritten[slot] = tokens[places].astype(np.int32), counts[places]

    def close(self, slot: int) -> None:
        """Forget a slot's log, if it has one. Its pages may be written anew behind what the device still reads."""
        log = self._logs.pop(slot, None)
        if log is not None:
            self._unwritten.pop(slot, None)
            self._free += log.pages

    def prepare(
        self, places: Ints, slots: list[int], rows: Rows, parts: list[slice], uploads: Uploads
    ) -> Penalties:
        """What penalises rows `places` of a batch, those of `slots`, and then makes their logs a token longer.

        `parts` are those of the batch that are worked on at once. Room for the tokens is taken here.
        """
        logs = [self._logs[slot] for slot in slots]
        held = np.asarray([len(log.pages) for log in logs])
        pages = np.asarray([page for log in logs for page in log.pages], dtype=np.int64)
        offsets = np.asarray([log.size % PAGE for log in logs])
        for log in logs:
            if log.size % PAGE == 0:
                log.pages.append(self._take())
            log.size += 1
        self._arena.grow(self._made)

        def spread(values: _Array) -> _Later:
            """By page."""
            return uploads.add(np.repeat(values, held))

        return Penalties(
            arena=self._arena,
            ranges=ranges(places, held, parts),
            unwritten=self._unwritten_to(uploads),
            places=uploads.add(places),
            pages=uploads.add(pages),
            owners=spread(np.arange(len(logs))),
            bases=spread(places % (parts[0].stop - parts[0].start) * self._vocab),
            repetition=spread(rows["repetition"]),
            presence=spread(rows["presence"]),
            frequency=spread(rows["frequency"]),
            last=uploads.add(np.asarray([log.pages[-1] for log in logs])),
            offsets=uploads.add(offsets),
        )

    def _unwritten_to(self, uploads: Uploads) -> tuple[_Later, _Later, _Later] | None:
        """Pages to be written first, their tokens and counts."""
        if not self._unwritten:
            return None
        # of a log that has become longer since, the page of the new token is not among them
        pages = [
            self._logs[slot].pages[: len(tokens) // PAGE] for slot, (tokens, _) in self._unwritten.items()
        ]
        tokens, counts = (
            np.concatenate([content[i] for content in self._unwritten.values()]).reshape(-1, PAGE)
            for i in range(2)
        )
        self._unwritten = {}
        return (
            uploads.add(np.asarray([page for of_log in pages for page in of_log])),
            uploads.add(tokens),
            uploads.add(counts),
        )

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._made += 1
        return self._made - 1


@dataclass(frozen=True, slots=True)
class Penalties:
    """What one call does with the logs of its penalised rows: Q rows, with P pages that hold something."""

    arena: _Arena
    ranges: list[tuple[int, int]]
    """Pages of the rows of each part of the batch."""
    unwritten: tuple[_Later, _Later, _Later] | None
    places: _Later
    """[Q]: rows in the batch."""
    pages: _Later
    """[P], as are the next five."""
    owners: _Later
    """Which of the Q rows a page belongs to."""
    bases: _Later
    """Where its row begins in the logits of the part."""
    repetition: _Later
    presence: _Later
    frequency: _Later
    last: _Later
    """[Q]: the page that the next token comes to, and where in it."""
    offsets: _Later

    def write(self) -> None:
        """Put logs that were opened since the last call on the device; before all else."""
        if self.unwritten is not None:
            pages, tokens, counts = (later() for later in self.unwritten)
            self.arena.tokens.index_copy_(0, pages, tokens)
            self.arena.counts.index_copy_(0, pages, counts)

    def penalise_(self, number: int, logits: Tensor, scores: Tensor) -> None:
        """Penalise rows of part `number`: `scores` are a contiguous float32 copy of its `logits` [m, vocab]."""
        raw, flat = logits.reshape(-1), scores.view(-1)
        for some in _slices(*self.ranges[number]):
            pages = self.pages()[some]
            counts = self.arena.counts.index_select(0, pages)
            at = (self.arena.tokens.index_select(0, pages) + self.bases()[some, None]).view(-1)
            repetition = self.repetition()[some, None]
            values = raw.index_select(0, at).float().view(counts.shape)
            values = torch.where(values > 0, values / repetition, values * repetition)
            values -= self.frequency()[some, None] * counts
            values -= self.presence()[some, None] * (counts > 0)
            flat.scatter_(0, at, values.view(-1))  # where a place occurs again, it gets the same again

    def advance(self, tokens: Tensor) -> None:
        """Make the logs longer by the `tokens` [M] that were chosen."""
        new = tokens.index_select(0, self.places()).int()
        now = new.new_ones(new.shape, dtype=torch.float32)
        for some in _slices(0, len(self.pages())):
            pages, owners = self.pages()[some], self.owners()[some]
            same = self.arena.tokens.index_select(0, pages) == new.index_select(0, owners)[:, None]
            counts = self.arena.counts.index_select(0, pages).add_(same)
            self.arena.counts.index_copy_(0, pages, counts)
            now.scatter_reduce_(0, owners, counts.mul_(same).amax(dim=1), "amax")
        last = self.last()
        beyond = torch.arange(PAGE, device=new.device) >= self.offsets()[:, None]
        for kept, value in ((self.arena.tokens, new), (self.arena.counts, now)):
            kept.index_copy_(0, last, torch.where(beyond, value[:, None], kept.index_select(0, last)))


def _slices(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _AT_ONCE):
        yield slice(first, min(first + _AT_ONCE, stop))
