"""A driver that records what is registered with it, refuses it, and does work late."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from seesaw.kv.transfers import copy_slabs

Call = tuple[str, int, int]


class Stream:
    """Work in order, done up to some point."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0

    def run(self, until: int) -> None:
        while self.done < until:
            self.queue[self.done]()
            self.done += 1


class Device:
    """A runtime and two streams, in and out, that do what they are given as late as they may, or sooner by chance."""

    def __init__(
        self, refuse: Callable[[int], int] = lambda size: 0, chance: random.Random | None = None
    ) -> None:
        self.refuse = refuse
        """The error for a registration of so many bytes."""
        self.calls: list[Call] = []
        self.registered: dict[int, int] = {}
        self.pinned_bytes = 0
        self._streams: tuple[Stream, Stream] = (Stream(), Stream())
        self._current = self._streams[0]
        self._chance = chance

    def register(self, address: int, size: int, read_only: bool) -> int:
        self.calls.append(("read-only" if read_only else "register", address, size))
        error = self.refuse(size)
        if not error:
            self.registered[address] = size
        return error

    def unregister(self, address: int) -> int:
        self.calls.append(("unregister", address, 0))
        return 0 if self.registered.pop(address, None) is not None else 713

    def explain(self, error: int) -> str:
        return {2: "out of memory", 713: "not registered"}[error]

    def synchronize(self) -> None:
        self.calls.append(("synchronize", 0, 0))
        for stream in self._streams:
            stream.run(len(stream.queue))

    def pinned(self, size: int) -> Tensor:
        self.pinned_bytes += size
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def record(self) -> SimpleNamespace:
        stream, behind = self._current, len(self._current.queue)
        return SimpleNamespace(synchronize=lambda: stream.run(behind))

    def copy(self, near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
        """A kernel for slabs of KV, on the stream of its direction."""
        self.launch(lambda: copy_slabs(near, far, table, to_host), to_host=to_host)

    def launch(self, work: Callable[[], object], *, to_host: bool = False) -> None:
        """Any work, on the stream of its direction."""
        self._current = stream = self._streams[to_host]
        stream.queue.append(work)
        if self._chance is not None:
            stream.run(self._chance.randint(stream.done, len(stream.queue)))


def refusing(size: int) -> int:
    return 2
