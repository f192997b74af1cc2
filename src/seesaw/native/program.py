"""Programs: native calls that Python would make one by one, recorded once and then made in one go.

A decode step is some two hundred native calls, and the Python between them takes longer than the smallest of them. So
the code that makes the calls is run once over stand-ins (`Recorder`): tensors without memory, of torch's meta device,
and a library that notes down what is called with what. What comes out (`Program`) is the same calls with the same
arguments, whatever Python would do now. Inputs and outputs may lie elsewhere each time; what calls hand on to each
other lies in one piece of scratch memory, where tensors that are not needed at the same time share their place.
Everything else (weights, KV) must stay where it is for as long as the program is run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seesaw.native.pointers import TensorPointer

Answer = Callable[[int], object]
"""What is done about an answer other than 0."""
Varying = Mapping[tuple[str, int], str]
"""Numbers that differ from run to run: by function and position among its arguments, their names."""

SCRATCH = "scratch"
"""The name of the scratch memory among a program's values."""
LINE = 64
"""Bytes of a cache line, at which tensors in scratch memory begin."""


class NotRecordable(Exception):
    """What is to be done over stand-ins is no native call. The message says what."""


@dataclass(slots=True)
class _Buffer:
    """Memory that calls read and write."""

    tensor: Tensor
    """The first of its tensors that was seen; it keeps the identity of the storage from being given away."""
    name: str = SCRATCH
    offset: int = 0
    first: int = 0
    last: int = 0
    """The calls between which scratch memory is in use."""

    @property
    def bytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


@dataclass(slots=True)
class _Call:
    """One row of a program."""

    label: str
    words: list[int]
    answer: Answer


@dataclass(slots=True)
class _Reference:
    """A word that is known when the program is run: the address of a buffer, or a number by its name."""

    row: int
    word: int
    source: _Buffer | str
    offset: int = 0


class Program:
    """Native calls, made in a row by `run`."""

    def __init__(
        self,
        library: ctypes.CDLL,
        calls: Sequence[_Call],
        references: Sequence[_Reference],
        scratch_bytes: int,
        kept: Sequence[object],
    ) -> None:
        """`kept` are objects whose memory the words refer to."""
        self._run = library["seesaw_program_run"]
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._run.argtypes = (pointer, count, count, pointer, ctypes.c_int32, pointer)
        self._run.restype = count
        self._rows = np.zeros((len(calls), library.seesaw_program_words()), dtype=np.int64)
        for row, call in zip(self._rows, calls, strict=True):
            row[: len(call.words)] = call.words
        self._answers = [call.answer for call in calls]
        self._kept = kept
        self.scratch_bytes = scratch_bytes
        """What a run needs of scratch memory."""
        names = [r.source if isinstance(r.source, str) else r.source.name for r in references]
        self.names = sorted(set(names))
        """Of the values that a run is given."""
        self._places = np.array([r.row * self._rows.shape[1] + r.word for r in references], dtype=np.int64)
        self._which = np.array([self.names.index(name) for name in names], dtype=np.int64)
        self._offsets = np.array([_offset(r) for r in references], dtype=np.int64)
        self._labels = sorted({call.label for call in calls})
        self._labelled = np.array([self._labels.index(call.label) for call in calls], dtype=np.int64)
        self._times = np.zeros(len(calls), dtype=np.int64)

    def run(self, values: Mapping[str, int], clock: int | None = None) -> None:
        """Make the calls. `values` has, for each of `names`, the address of an input, an output or `scratch`, or a
        number. With a `clock` (of `time.clock_gettime`), `times` has the figures afterwards."""
        given = np.array([values[name] for name in self.names], dtype=np.int64)
        self._rows.reshape(-1)[self._places] = given[self._which] + self._offsets
        status = ctypes.c_int32()
        rows, count, at = self._rows.ctypes.data, len(self._rows), 0
        times = None if clock is None else self._times.ctypes.data
        while (at := self._run(rows, count, at, times, clock or 0, ctypes.addressof(status))) < count:
            self._answers[at](status.value)
            at += 1

    def times(self) -> Iterator[tuple[str, int, float]]:
        """Of the last run that was timed: each function's label, its calls and the seconds they took."""
        calls = np.bincount(self._labelled, minlength=len(self._labels))
        seconds = np.bincount(self._labelled, weights=self._times * 1e-9, minlength=len(self._labels))
        return zip(self._labels, calls.tolist(), seconds.tolist(), strict=True)


class Recorder:
    """Notes down native calls that are made over meta tensors.

    What torch computes over them leaves no trace in the program, so whoever would have it computed there raises
    `NotRecordable` instead. Allocate with `new_empty`: unlike most else, it has meta tensors without loading a
    library for symbolic arithmetic.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._calls: list[_Call] = []
        self._references: list[_Reference] = []
        self._buffers: dict[int, _Buffer] = {}
        self._kept: list[object] = []

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A stand-in for a contiguous tensor whose address a run is given as `name`. Calls may change it."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._buffers[_storage(tensor)] = _Buffer(tensor, name)
        return tensor

    def output(self, name: str, tensor: Tensor) -> None:
        """Have a run leave `tensor`, a whole result of a call, at an address that it is given as `name`."""
        buffer = self._buffers[_storage(tensor)]
        assert buffer.name == SCRATCH and buffer.bytes == tensor.nbytes, (buffer.name, tensor.shape)
        buffer.name = name

    def library(self, answer: Answer | None = None, varying: Varying | None = None) -> RecordedLibrary:
        """A stand-in for the native library. Without `answer`, no call may answer other than 0."""
        return RecordedLibrary(self, self._library, answer, varying or {})

    def note(
        self, call: int, name: str, arguments: Sequence[tuple[Any, Any]], library: RecordedLibrary
    ) -> None:
        """Note down a call of the function `name`: its `arguments` are pairs of type and value."""
        words = [call]
        for position, (kind, value) in enumerate(arguments):
            number = library.varying.get((name, position))
            if number is not None:
                self._references.append(_Reference(len(self._calls), len(words), number))
            words.append(0 if number is not None else self._word(len(words), kind, value))
        answer = library.answer or _never(name)
        self._calls.append(_Call(_label(name, [value for _, value in arguments]), words, answer))

    def program(self) -> Program:
        """What was recorded."""
        scratch = _placed(buffer for buffer in self._buffers.values() if buffer.name == SCRATCH)
        return Program(self._library, self._calls, self._references, scratch, self._kept)

    def _word(self, word: int, kind: Any, value: Any) -> int:
        if kind is TensorPointer:
            return 0 if value is None else self._address(word, value)
        if isinstance(value, ctypes.Array):
            self._kept.append(value)
            return ctypes.addressof(value)
        if isinstance(value, ctypes.c_void_p):
            return value.value or 0
        if kind is ctypes.c_float:
            return int(np.float64(value).view(np.int64))
        return int(value)

    def _address(self, word: int, tensor: Tensor) -> int:
        if not tensor.is_meta:
            return tensor.data_ptr()
        row = len(self._calls)
        buffer = self._buffers.setdefault(_storage(tensor), _Buffer(tensor, first=row))
        buffer.last = row
        offset = int(tensor.storage_offset()) * tensor.element_size()
        self._references.append(_Reference(row, word, buffer, offset))
        return 0


class RecordedLibrary:
    """Stands for the native library: what can be recorded is; everything else is called."""

    def __init__(
        self, recorder: Recorder, library: ctypes.CDLL, answer: Answer | None, varying: Varying
    ) -> None:
        self.answer, self.varying = answer, varying
        self._recorder, self._library = recorder, library
        self._find = library["seesaw_program_call"]
        self._find.restype, self._find.argtypes = ctypes.c_int64, (ctypes.c_char_p,)

    def __getitem__(self, name: str) -> Any:
        return self._of(name, self._library[name])

    def __getattr__(self, name: str) -> Any:
        return self._of(name, getattr(self._library, name))

    def _of(self, name: str, function: Any) -> Any:
        call = self._find(name.encode())
        return _Recorded(self._recorder, self, name, call, function.argtypes or ()) if call else function


class _Recorded:
    """A function of a `RecordedLibrary`. It answers 0."""

    def __init__(
        self, recorder: Recorder, library: RecordedLibrary, name: str, call: int, argtypes: Sequence[Any]
    ) -> None:
        self._recorder, self._library, self._name, self._call = recorder, library, name, call
        self.argtypes = argtypes
        self.restype: Any = None

    def __call__(self, *values: Any) -> int:
        arguments = list(zip(self.argtypes, values, strict=True))
        self._recorder.note(self._call, self._name, arguments, self._library)
        return 0


def _storage(tensor: Tensor) -> int:
    """The identity of the memory that views of a tensor share, for as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _offset(reference: _Reference) -> int:
    inside = reference.offset
    return inside if isinstance(reference.source, str) else reference.source.offset + inside


def _placed(buffers: Iterable[_Buffer]) -> int:
    """Give each buffer the lowest place that none has which is in use at the same time; returns the bytes needed."""
    size, taken = 0, list[_Buffer]()
    for buffer in sorted(buffers, key=lambda b: b.first):
        taken = [other for other in taken if other.last >= buffer.first]
        at = 0
        for other in sorted(taken, key=lambda b: b.offset):
            if other.offset - at >= buffer.bytes:
                break
            at = max(at, -(-(other.offset + other.bytes) // LINE) * LINE)
        buffer.offset = at
        taken.append(buffer)
        size = max(size, at + buffer.bytes)
    return size


def _never(name: str) -> Answer:
    def fail(status: int) -> None:
        raise AssertionError(f"{name} in a program answers {status}")

    return fail


def _label(name: str, values: Sequence[Any]) -> str:
    """As `execution.profiling` calls it: products are told apart by the shape of their weight."""
    if name == "seesaw_linear":
        columns, depth = values[5:7]
        return f"linear {columns}x{depth}"
    short = name.removeprefix("seesaw_")
    if not short.startswith(("tcp_", "shm_")):
        return short
    return "all_reduce" if short.endswith("_all_reduce") and "begin" not in short else "all_reduce_in_parts"
