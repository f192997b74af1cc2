"""Histories of jobs of any length in bounded memory: what is finer than a page can show is given up, evenly."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

import msgspec

_T = TypeVar("_T")


class PhaseSpan(msgspec.Struct, array_like=True, frozen=True):
    """What the ranks were doing for a while. Times are seconds since the engine started."""

    start: float
    seconds: float
    phase: str


class Phases:
    """Phases one after the other, without gaps but where nothing ran; at most `most` spans.

    Beyond that, spans shorter than a resolution that grows as needed are taken together under the name of what took
    longest among them.
    """

    def __init__(self, most: int = 2000) -> None:
        self.spans: list[PhaseSpan] = []
        self._most = most
        self._resolution = 0.001
        """Seconds below which spans are taken together, once there are too many."""

    def add(self, start: float, seconds: float, phase: str) -> None:
        """`phase` went on from `start`, where the last one ended or later."""
        last = self.spans[-1] if self.spans else None
        if last is not None and last.phase == phase and start - last.start - last.seconds < 1e-3:
            self.spans[-1] = PhaseSpan(last.start, start + seconds - last.start, phase)
            return
        self.spans.append(PhaseSpan(start, seconds, phase))
        while len(self.spans) > self._most:
            self._coarsen()

    def _coarsen(self) -> None:
        merged: list[PhaseSpan] = []
        longest = 0.0  # of the parts of the last one
        for span in self.spans:
            if merged and merged[-1].seconds < self._resolution:
                last = merged[-1]
                name = span.phase if span.seconds > longest else last.phase
                longest = max(longest, span.seconds)
                merged[-1] = PhaseSpan(last.start, span.start + span.seconds - last.start, name)
            else:
                merged.append(span)
                longest = span.seconds
        self.spans = merged
        self._resolution *= 2


class Thinned(Generic[_T]):
    """Items of a history, at most `most` of them: when there are more, every second one is dropped."""

    def __init__(self, most: int) -> None:
        self.items: list[_T] = []
        self.every = 1
        """One of how many is kept."""
        self._most, self._seen = most, 0

    def add(self, item: _T) -> None:
        """Keep `item` if it is its turn, as one of those that come at a steady pace."""
        if self._seen % self.every == 0:
            self.keep(item)
        self._seen += 1

    def keep(self, item: _T) -> None:
        """Keep `item`; who adds so comes but once in `every` times."""
        self.items.append(item)
        if len(self.items) > self._most:
            self.items = self.items[::2]
            self.every *= 2


class Lengths:
    """How long prompts and outputs of sequences that ended were."""

    def __init__(self, sample: int = 4096) -> None:
        self.prompts: dict[int, int] = {}
        """Sequences by the least length of their bucket (`bucket`)."""
        self.outputs: dict[int, int] = {}
        self.sample: list[tuple[int, int]] = []
        """(prompt tokens, output tokens) of some sequences, each as likely as any other to be among them."""
        self._most, self._seen, self._random = sample, 0, random.Random(0)

    def add(self, prompt: int, output: int) -> None:
        """A sequence has ended."""
        for counts, length in ((self.prompts, prompt), (self.outputs, output)):
            least = bucket(length)
            counts[least] = counts.get(least, 0) + 1
        self._seen += 1
        if len(self.sample) < self._most:
            self.sample.append((prompt, output))
        elif (place := int(self._random.random() * self._seen)) < self._most:
            self.sample[place] = (prompt, output)


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine remembers of its past."""

    phases: list[PhaseSpan] = []
    prompts: dict[int, int] = {}
    """Sequences that ended, by the length of their prompts: keys are the least lengths of buckets."""
    outputs: dict[int, int] = {}
    sample: list[tuple[int, int]] = []
    """(prompt tokens, output tokens) of at most 4,096 of them, drawn by chance."""


def bucket(length: int) -> int:
    """The least length in the bucket of `length`: exact below 32, then sixteen buckets for each doubling."""
    width = bucket_width(length)
    return length // width * width


def bucket_width(length: int) -> int:
    """How many lengths share the bucket of `length`."""
    return 1 << max(length.bit_length() - 5, 0)
