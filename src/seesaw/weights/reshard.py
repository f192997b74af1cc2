"""The weights of one rank: loading them from the host store, and changing from one sharding to another."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from seesaw.core.model_spec import DType, ModelSpec
from seesaw.weights.copies import copy_box
from seesaw.weights.sharding import (
    CopyList,
    Mode,
    Sharding,
    TensorChange,
    copy_list,
)
from seesaw.weights.store import TORCH_DTYPES, HostWeightStore


@dataclass(frozen=True, slots=True)
class TransitionStats:
    """What a change moved: bytes (of the compute type) copied from the host store, bytes the rank had
    already, how many of these had to be copied on the device, and the time it took."""

    bytes_fetched: int
    bytes_kept: int
    bytes_copied: int
    seconds: float


class MemoryLedger:
    """Bytes of the device tensors that exist, counted when memory is taken and when it is really freed.

    A tensor that somebody still refers to, even by a view, counts until that reference is gone.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the only place where device memory for weights is taken."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        size = tensor.numel() * tensor.element_size()
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(tensor.untyped_storage(), self._release, size).atexit = False
        return tensor

    def _release(self, size: int) -> None:
        self.bytes -= size


class RankWeights:
    """The device tensors of `rank` under its current sharding, in the compute type `dtype`.

    `tensors` maps the names of `device_tensors` to tensors, in their order. `load` and `transition` replace
    the mapping, and empty the one before unless it stays resident. Whoever keeps single tensors (the decoder)
    must let go of them before a transition that is not resident: their memory is free only then, and
    `plan_peak_bytes` counts on it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        store: HostWeightStore,
        dtype: DType,
        rank: int,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.sharding: Sharding | None = None
        self.ledger = MemoryLedger()
        self._spec = spec
        self._store = store
        self._dtype = dtype
        self._rank = rank
        self._device = torch.device(device)
        self._resident: dict[Sharding, dict[str, Tensor]] = {}

    @property
    def peak_bytes(self) -> int:
        """Most bytes of device tensors that existed at once so far."""
        return self.ledger.peak_bytes

    def load(self, sharding: Sharding) -> TransitionStats:
        """Drop everything held and load the rank's part of `sharding` from the host store."""
        return self.transition(sharding, "reload")

    def transition(self, new: Sharding, mode: Mode) -> TransitionStats:
        """Change to the sharding `new`; see `Mode`. Also the first load, when nothing is held.

        In `resident` mode at most two shardings are held, the one before the change and `new`; any other is
        dropped first. The other modes drop all but the current one.
        """
        started = time.perf_counter()
        if mode != "resident":
            self._resident.clear()
        elif self.sharding is not None:
            self._resident[self.sharding] = self.tensors
        fetched, kept, copied = self._switch(new) if new in self._resident else self._change(new, mode)
        self.sharding = new
        self._synchronize()
        return TransitionStats(fetched, kept, copied, seconds=time.perf_counter() - started)

    def _switch(self, new: Sharding) -> tuple[int, int, int]:
        """Take up a resident sharding. Returns bytes fetched, kept and copied."""
        self.tensors = self._resident[new]
        return 0, sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values()), 0

    def _change(self, new: Sharding, mode: Mode) -> tuple[int, int, int]:
        """Make the tensors of `new`. Returns bytes fetched, kept and copied."""
        if mode == "reload":
            copies = self._change_reloading(new)
        elif mode == "delta":
            copies = self._change_by_delta(new)
        else:
            copies = self._change_beside(new)
        dtype = self._dtype
        return copies.bytes_fetched(dtype), copies.bytes_kept(dtype), copies.bytes_copied(dtype)

    def _change_reloading(self, new: Sharding) -> CopyList:
        self.tensors.clear()
        copies = copy_list(self._spec, None, new, self._rank)
        self.tensors = {change.tensor.name: self._make(change, {}) for change in copies.changes}
        return copies

    def _change_by_delta(self, new: Sharding) -> CopyList:
        copies = copy_list(self._spec, self.sharding, new, self._rank)
        held = self.tensors
        for tensor in copies.dropped:
            del held[tensor.name]
        made: dict[str, Tensor] = {}
        for change in copies.steps():
            made[change.tensor.name] = self._make(change, held)
            if change.source:
                del held[change.source.name]
        self.tensors = {change.tensor.name: made[change.tensor.name] for change in copies.changes}
        return copies

    def _change_beside(self, new: Sharding) -> CopyList:
        for other in self._resident.keys() - {self.sharding}:
            del self._resident[other]
        copies = copy_list(self._spec, self.sharding, new, self._rank)
        held = self.tensors
        self.tensors = {change.tensor.name: self._make(change, held) for change in copies.changes}
        self._resident[new] = self.tensors
        return copies

    def _make(self, change: TensorChange, held: dict[str, Tensor]) -> Tensor:
        """The new tensor, from the tensors `held` and the host store. Keeps no reference to its source."""
        if change.reuse:
            assert change.source is not None
            return held[change.source.name]
        target = self.ledger.allocate(change.tensor.shape, TORCH_DTYPES[self._dtype], self._device)
        for keep in change.keep:
            copy_box(held[keep.source], keep.origin, target, keep.target)
        for fetch in change.fetch:
            copy_box(self._store.tensor(fetch.parameter), fetch.origin, target, fetch.target)
        return target

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
