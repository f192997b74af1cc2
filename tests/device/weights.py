"""What happens to the weights of ranks that are threads: who writes and reads them, and which memory they get."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seesaw.weights.reshard import MemoryLedger
from tests.device.races import FakeCuda, Memory

UNIT = 256
"""Bytes of a row that is watched."""
CAPACITY = 1 << 20
"""Bytes that a rank's weights take at most."""


class Heap:
    """The memory of a rank's weights, given out as torch's allocator does: what is freed goes to whoever asks next on
    the same stream, whatever other streams still do with it."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self._name = cuda, name
        self._rows = Memory(cuda, name, torch.empty(CAPACITY, dtype=torch.uint8), UNIT)
        self._free = [(0, CAPACITY // UNIT)]
        """(first, count) of rows, what was freed last at the end."""
        self._held: dict[int, tuple[int, int, int]] = {}
        """By the address of each tensor's memory: that behind its end, its first row and how many it has."""
        self._stream: int | None = None
        self._lock = threading.RLock()

    def allocated(self, tensor: Tensor) -> None:
        """A tensor was made, on the stream at hand."""
        storage = tensor.untyped_storage()
        count = max(1, -(-storage.nbytes() // UNIT))
        with self._lock:
            stream = self._cuda.acting().number
            if self._stream not in (None, stream):
                self._cuda.races.add(f"{self._name}: allocated on two streams")
            self._stream = stream
            place = next(i for i in reversed(range(len(self._free))) if self._free[i][1] >= count)
            first, room = self._free.pop(place)
            if room > count:
                self._free.insert(place, (first + count, room - count))
            self._held[storage.data_ptr()] = storage.data_ptr() + storage.nbytes(), first, count
        weakref.finalize(storage, self._freed, storage.data_ptr()).atexit = False

    def _freed(self, address: int) -> None:
        with self._lock:
            _, first, count = self._held.pop(address)
            self._free.append((first, count))

    def touch(self, tensor: Tensor, *, write: bool, what: str) -> None:
        """The tensor at hand, if it is a weight or a view of one, is read or written."""
        at = tensor.data_ptr()
        with self._lock:
            found = next(
                ((first, count) for start, (end, first, count) in self._held.items() if start <= at < end),
                None,
            )
        if found is not None:
            first, count = found
            self._rows.touch(np.arange(first, first + count), write=write, what=what)


class WeightsWatch:
    """Watches all ranks; each thread's weights are its own."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._own = threading.local()

    def heap(self) -> Heap:
        """Of this thread."""
        if not hasattr(self._own, "heap"):
            self._own.heap = Heap(self._cuda, f"weights of {threading.current_thread().name}")
        heap: Heap = self._own.heap
        return heap

    def allocate(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`MemoryLedger.allocate`."""

        def run(ledger: MemoryLedger, *given: Any) -> Tensor:
            tensor = plain(ledger, *given)
            self.heap().allocated(tensor)
            return tensor

        return run

    def copy_box(self, plain: Callable[..., None]) -> Callable[..., None]:
        """`copies.copy_box`."""

        def run(source: Tensor, origin: Any, target: Tensor, place: Any) -> None:
            self.heap().touch(source, write=False, what="a copy of what stays")
            self.heap().touch(target, write=True, what="a copy")
            plain(source, origin, target, place)

        return run

    def read(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """An operator: it reads whatever weights it is given."""

        def run(*given: Any, **named: Any) -> Any:
            for tensor in _tensors((*given, *named.values())):
                self.heap().touch(tensor, write=False, what="an operator")
            return plain(*given, **named)

        return run

    def operators(self, plain: Any) -> Any:
        """All of them."""
        return _Watched(plain, self.read)


class _Watched:
    def __init__(self, inner: Any, wrap: Callable[..., Any]) -> None:
        self._inner, self._wrap = inner, wrap

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._wrap(found) if callable(found) else found


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) or isinstance(value, tuple):
            inner = value if isinstance(value, tuple) else [getattr(value, f.name) for f in fields(value)]
            yield from _tensors(inner)
