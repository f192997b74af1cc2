"""The weights of one rank: loading them from the host store, and changing from one sharding to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.device.base import Device, Event
from seesaw.device.cpu import CpuDevice
from seesaw.weights.arrivals import Arrivals
from seesaw.weights.copies import copy_box
from seesaw.weights.host_copies import HostCopies
from seesaw.weights.memory import HostArena, MemoryLedger
from seesaw.weights.schedule import Schedule, all_at_once, schedule
from seesaw.weights.sharding import (
    CopyList,
    Mode,
    Sharding,
    TensorChange,
    copy_list,
    reload_list,
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


@dataclass(frozen=True, slots=True)
class Reshard:
    """A change that has been launched."""

    bytes_fetched: int
    bytes_kept: int
    bytes_copied: int
    arrivals: Arrivals | None
    """What computation must wait for before it uses the new tensors; None where they are there already."""
    spans: tuple[tuple[Event, Event], ...]
    """Beginning and end of each stretch of copies."""

    def stats(self) -> TransitionStats:
        """What it moved, once the device has done it."""
        seconds = sum(end.seconds_since(begin) for begin, end in self.spans)
        return TransitionStats(self.bytes_fetched, self.bytes_kept, self.bytes_copied, seconds)

    def wait(self) -> TransitionStats:
        """Block until the device has done it."""
        self.spans[-1][1].wait()
        return self.stats()


class RankWeights:
    """The device tensors of `rank` under its current sharding, in the compute type `dtype`.

    `tensors` maps the names of `device_tensors` to tensors, in their order. `load`, `transition` and `begin` replace
    the mapping, and empty the one before unless it stays resident. Whoever keeps single tensors (the decoder)
    must let go of them before a transition that is not resident: their memory is free only then, and
    `plan_peak_bytes` counts on it.

    Why no memory of a weight is written while something else still uses it, on a device whose streams run beside
    each other: all weights are allocated and written on the stream `weights`, so the allocator hands memory that is
    freed on to this stream alone, whose work is in order. All else that uses weights is the work of `compute`: it
    comes behind the copies by `Arrivals`; and whenever weights are let go, `_behind_computation` holds back later
    copies until the computation launched before is done. So tensors are dropped while computation still reads them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        store: HostWeightStore,
        dtype: DType,
        rank: int,
        *,
        device: Device | None = None,
        budget: int = 0,
        lock: bool = True,
        arena: HostArena | None = None,
    ) -> None:
        """`device` is a CPU rank's unless given.

        `budget` are the bytes that weights may take. On a device whose streams run beside each other, what of it a
        transition by `delta` or `reload` finds free takes tensors in while computation goes on. Whatever it is, no
        transition takes more than the larger of it and `plan_peak_bytes`. With `lock` a GPU reaches the store itself,
        which stays in the host's memory until `close`. On a CPU rank weights lie in `arena`, if there is one.
        """
        self.tensors: dict[str, Tensor] = {}
        self.sharding: Sharding | None = None
        self.ledger = MemoryLedger(arena)
        self._spec = spec
        self._store = store
        self._dtype = dtype
        self._rank = rank
        self._device = device or CpuDevice()
        self._beside = self._device.weights is not self._device.compute
        self._budget = budget if self._beside else 0
        self._resident: dict[Sharding, dict[str, Tensor]] = {}
        self._host: HostCopies | None = None
        if self._device.torch.type == "cuda":
            self._host = HostCopies(store.mappings if lock else ())
        self._fetch = copy_box if self._host is None else self._host.copy_box

    @property
    def peak_bytes(self) -> int:
        """Most bytes of device tensors that existed at once so far."""
        return self.ledger.peak_bytes

    def load(self, sharding: Sharding) -> TransitionStats:
        """Drop everything held and load the rank's part of `sharding` from the host store."""
        return self.transition(sharding, "reload")

    def transition(self, new: Sharding, mode: Mode) -> TransitionStats:
        """Change to the sharding `new` and wait until the device has done it; see `begin`."""
        return self.begin(new, mode).wait()

    def begin(self, new: Sharding, mode: Mode) -> Reshard:
        """Launch the change to the sharding `new`; see `Mode`. Also the first load, when nothing is held.

        Computation launched before still has the old weights, what is launched later has to wait for the new ones
        (`Reshard.arrivals`). In `resident` mode at most two shardings are held, the one before the change and
        `new`; any other is dropped first. The other modes drop all but the current one.
        """
        begun = self._device.weights.record()
        arrivals = Arrivals(self._device.compute, begun) if self._beside else None
        if mode != "resident":
            self._let_go(self._resident.keys() - {self.sharding})
            self._resident.clear()
        elif self.sharding is not None:
            self._resident[self.sharding] = self.tensors
        if new in self._resident:
            self.tensors = self._resident[new]
            self.sharding = new
            kept = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
            return Reshard(0, kept, 0, arrivals, ((begun, begun),))
        if mode == "resident":
            copies = copy_list(self._spec, self.sharding, new, self._rank)
            spans = self._change_beside(new, copies, arrivals)
        else:
            listed = copy_list if mode == "delta" else reload_list
            copies = listed(self._spec, self.sharding, new, self._rank)
            spans = self._change_in_place(copies, arrivals)
        self.sharding = new
        dtype = self._dtype
        fetched, kept, copied = (
            of(dtype) for of in (copies.bytes_fetched, copies.bytes_kept, copies.bytes_copied)
        )
        return Reshard(fetched, kept, copied, arrivals, spans)

    def close(self) -> None:
        """Give host memory back to the system. Nothing may be under way."""
        if self._host is not None:
            self._host.close()

    def _change_beside(
        self, new: Sharding, copies: CopyList, arrivals: Arrivals | None
    ) -> tuple[tuple[Event, Event], ...]:
        """The old tensors stay."""
        self._let_go(self._resident.keys() - {self.sharding})
        held, made = self.tensors, dict[str, Tensor]()
        span = self._run(all_at_once(copies).ahead, held, made, arrivals)
        self.tensors = self._resident[new] = self._in_order(copies, held, made)
        return (span,)

    def _change_in_place(
        self, copies: CopyList, arrivals: Arrivals | None
    ) -> tuple[tuple[Event, Event], ...]:
        """The old tensors are freed: first what nothing is made of, then each when its new tensor is complete."""
        plan = self._schedule(copies)
        held, made = self.tensors, dict[str, Tensor]()
        ahead = self._run(plan.ahead, held, made, arrivals)
        for tensor in copies.dropped:
            del held[tensor.name]
        for change in plan.ahead:
            if change.source:
                del held[change.source.name]
        self._behind_computation()
        behind = self._run(plan.behind, held, made, arrivals, free=True)
        self.tensors = self._in_order(copies, held, made)
        held.clear()
        return ahead, behind

    def _schedule(self, copies: CopyList) -> Schedule:
        width = DTYPE_BYTES[self._dtype]
        return schedule(copies, held=-(-self.ledger.bytes // width), room=self._budget // width)

    def _run(
        self,
        changes: Iterable[TensorChange],
        held: dict[str, Tensor],
        made: dict[str, Tensor],
        arrivals: Arrivals | None,
        *,
        free: bool = False,
    ) -> tuple[Event, Event]:
        """Launch the copies of `changes` in order, with `free` letting go of each source; beginning and end."""
        weights = self._device.weights
        begun = weights.record()
        for change in changes:
            weights.launch(lambda change=change: self._make(change, held, made))  # type: ignore[misc]
            if free and change.source:
                del held[change.source.name]
            if arrivals is not None:
                arrivals.launched(change.tensor.name, weights.record())
        return begun, weights.record()

    def _make(self, change: TensorChange, held: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """Launch the copies of one new tensor, from the tensors `held` and the host store."""
        target = self.ledger.allocate(change.tensor.shape, TORCH_DTYPES[self._dtype], self._device.torch)
        for keep in change.keep:
            copy_box(held[keep.source], keep.origin, target, keep.target)
        for fetch in change.fetch:
            self._fetch(self._store.tensor(fetch.parameter), fetch.origin, target, fetch.target)
        made[change.tensor.name] = target

    def _in_order(
        self, copies: CopyList, held: dict[str, Tensor], made: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The new mapping: what has been made, and what stays as it is."""
        tensors: dict[str, Tensor] = {}
        for change in copies.changes:
            if change.reuse:
                assert change.source is not None
                tensors[change.tensor.name] = held[change.source.name]
            else:
                tensors[change.tensor.name] = made[change.tensor.name]
        return tensors

    def _let_go(self, shardings: Iterable[Sharding]) -> None:
        """Of resident shardings that are not the current one."""
        for sharding in list(shardings):
            del self._resident[sharding]
            self._behind_computation()

    def _behind_computation(self) -> None:
        """Hold back copies from here on until computation has done what was launched: weights were let go that it may
        still read, whose memory is written next. Copies into memory that was free before need not wait."""
        if self._beside:
            self._device.weights.after(self._device.compute.record())
