"""Where a rank's time goes, by phase and function: timers around what a Forward calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from torch import Tensor

_T = TypeVar("_T")


class FunctionTime(msgspec.Struct):
    """Calls of one function in one phase, and the seconds they took."""

    calls: int = 0
    seconds: float = 0.0


class PhaseProfile(msgspec.Struct):
    """One phase of one rank: Forwards run, their seconds in all, and of these the timed functions' share.

    A function's seconds are without those of other timed ones that it calls; what they leave of `seconds` is Python
    and small torch operators.
    """

    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    functions: dict[str, FunctionTime] = {}


class Profile:
    """Times the methods of the objects it wraps, booked to the phase under way. For one thread."""

    def __init__(self) -> None:
        self.phases: dict[str, PhaseProfile] = defaultdict(PhaseProfile)
        self._phase = PhaseProfile()
        self._inside = 0.0
        """Seconds of timed functions within the one under way."""

    @contextmanager
    def forward(self, phase: str, tokens: int) -> Iterator[None]:
        """Book what runs inside to `phase`."""
        self._phase = self.phases[phase]
        started = time.perf_counter()
        yield
        self._phase.seconds += time.perf_counter() - started
        self._phase.forwards += 1
        self._phase.tokens += tokens

    def wrap(self, subject: _T, methods: tuple[str, ...]) -> _T:
        """`subject` with timers around `methods`."""
        return cast(_T, Timed(subject, {name: self._timed(subject, name) for name in methods}))

    def book(self, label: str, calls: int, seconds: float) -> None:
        """Calls of a function that were timed elsewhere, within what `forward` runs."""
        entry = self._phase.functions.setdefault(label, FunctionTime())
        entry.calls += calls
        entry.seconds += seconds

    def write(self, path: Path) -> None:
        """Write the phases to `path`, as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self.phases)))

    def _timed(self, subject: object, name: str) -> Callable[..., Any]:
        method = getattr(subject, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._inside = self._inside, 0.0
            started = time.perf_counter()
            result = method(*args, **kwargs)
            seconds = time.perf_counter() - started
            self.book(_label(name, args), 1, seconds - self._inside)
            self._inside = before + seconds
            return result

        return call


class Timed:
    """Stands for `subject`; some of its methods are replaced, by others that time them."""

    def __init__(self, subject: object, methods: dict[str, Callable[..., Any]]) -> None:
        self._subject = subject
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


def _label(name: str, args: tuple[Any, ...]) -> str:
    """The function's name; products are told apart by the shape of their weight."""
    if name == "linear" and isinstance(args[1], Tensor):
        return f"linear {args[1].shape[0]}x{args[1].shape[1]}"
    return name
