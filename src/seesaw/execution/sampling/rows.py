"""What the host knows of the sequences whose tokens are chosen: parameters, noise, and what goes to the device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from seesaw.core.actions import SamplingState

if TYPE_CHECKING:
    from seesaw.device.base import Array, Device

CLOSED, PLAIN, CUSTOM = 0, 1, 2
"""States of a slot; plain ones take the most likely token and keep nothing."""
_GREEDY_BELOW = 1e-5

ROW = np.dtype(
    [
        ("state", "u1"),
        ("penalised", "?"),
        ("temperature", "f4"),
        ("top_p", "f8"),
        ("top_k", "i8"),
        ("min_p", "f4"),
        ("repetition", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("noise_key", "u8"),
        ("logprobs", "i8"),
        ("min_tokens", "i8"),
        ("generated", "i8"),
    ]
)

Rows = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def opened(state: SamplingState, vocab: int) -> tuple[Any, ...]:
    """The fields of `ROW` for a sequence."""
    penalised = (
        state.repetition_penalty != 1.0 or state.presence_penalty != 0.0 or state.frequency_penalty != 0.0
    )
    return (
        CUSTOM,
        penalised,
        state.temperature,
        state.top_p,
        state.top_k if 0 < state.top_k < vocab else 0,
        state.min_p,
        state.repetition_penalty,
        state.presence_penalty,
        state.frequency_penalty,
        state.noise_key,
        state.logprobs,
        state.min_tokens,
        state.generated,
    )


def drawn(rows: Rows) -> Flags:
    """Which rows take a token by chance."""
    found: Flags = (rows["state"] == CUSTOM) & (rows["temperature"] >= _GREEDY_BELOW)
    return found


def penalised(rows: Rows) -> Flags:
    """Which rows' logits depend on the tokens seen so far."""
    found: Flags = (rows["state"] == CUSTOM) & rows["penalised"]
    return found


def waiting(rows: Rows) -> Flags:
    """Which rows may not stop yet."""
    found: Flags = (rows["state"] == CUSTOM) & (rows["generated"] < rows["min_tokens"])
    return found


def asked(rows: Rows) -> Ints:
    """Most likely tokens wanted per row; -1 for rows that want no log-probabilities."""
    found: Ints = np.where(rows["state"] == CUSTOM, rows["logprobs"], -1)
    return found


def uniforms(keys: npt.NDArray[np.uint64], indexes: Ints) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per (key, index): the top 52 bits of output `index` of SplitMix64(`key`)."""
    with np.errstate(over="ignore"):
        bits = keys + (indexes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    mantissa: npt.NDArray[np.float64] = (bits >> np.uint64(12)).astype(np.float64)
    return (mantissa + 0.5) * 2.0**-52


def ranges(rows: Ints, counts: Ints, parts: list[slice]) -> list[tuple[int, int]]:
    """Where the entries of each part begin and end, if row `rows[i]` of the batch has `counts[i]`; rows rise."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    starts = ends[np.searchsorted(rows, [part.start for part in parts])].tolist()
    return list(pairwise([*starts, int(ends[-1])]))


class Uploads:
    """Arrays that one call needs on the device: collected first, then sent in one copy, for which nobody waits."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._arrays: list[Array] = []
        self._tensors: list[Tensor] = []

    def add(self, array: Array) -> Callable[[], Tensor]:
        """What gives the tensor, once it is sent. The array must not change any more."""
        number = len(self._arrays)
        self._arrays.append(array)
        return lambda: self._tensors[number]

    def send(self) -> None:
        """Send all of them."""
        self._tensors = self._device.upload(self._arrays)
