"""`RankWeights` on a device whose streams run beside each other: what waits for what, and within which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from seesaw.core.layout import Layout
from seesaw.device.cuda import CudaDevice
from seesaw.weights import reshard
from seesaw.weights.arrivals import Arrivals
from seesaw.weights.changes import Mode
from seesaw.weights.reshard import RankWeights, Reshard
from seesaw.weights.sharding import Sharding, make_sharding, plan_peak_bytes
from seesaw.weights.store import HostWeightStore
from tests.device.races import FakeCuda
from tests.device.test_uploads import device
from tests.device.weights import WeightsWatch
from tests.weights.shapes import TINY, usable
from tests.weights.test_reshard import MODES, assert_holds

Patch = pytest.MonkeyPatch
RANK = 1


class Rig:
    """One rank's weights, a computation that reads all of them, and what is found wrong."""

    def __init__(self, store: HostWeightStore, budget: int, cuda: FakeCuda, watch: WeightsWatch) -> None:
        self.cuda, self.watch = cuda, watch
        self.device: CudaDevice = device(cuda)
        self.weights = RankWeights(TINY, store, "float32", RANK, device=self.device, budget=budget)
        self.arrivals: Arrivals | None = None

    def begin(self, sharding: Sharding, mode: Mode) -> Reshard:
        """Launch a change."""
        change = self.weights.begin(sharding, mode)
        self.arrivals = change.arrivals
        return change

    def compute(self) -> None:
        """Read every tensor, layer by layer, as a Forward does."""
        assert self.arrivals is not None
        for name, tensor in self.weights.tensors.items():
            kind, _, rest = name.partition(".")
            self.arrivals.before(
                int(rest.partition(".")[0]) if kind == "layers" else -1 if kind == "embed" else -2
            )
            self.device.compute.launch(
                lambda tensor=tensor: self.watch.heap().touch(tensor, write=False, what="use")
            )  # type: ignore[misc]


@contextmanager
def rig(patch: Patch, budget: int = 0) -> Iterator[Rig]:
    cuda = FakeCuda()
    watch = WeightsWatch(cuda)
    with patch.context() as inner, HostWeightStore.dummy(TINY, "float32", seed=3) as store:
        inner.setattr(reshard, "copy_box", watch.copy_box(reshard.copy_box))
        inner.setattr(reshard.MemoryLedger, "allocate", watch.allocate(reshard.MemoryLedger.allocate))
        made = Rig(store, budget, cuda, watch)
        yield made
        made.device.close()


def shardings(*layouts: str) -> list[Sharding]:
    return [make_sharding(TINY, Layout.parse(layout)) for layout in layouts]


@pytest.mark.parametrize("mode", MODES)
def test_any_chain_of_changes_is_ordered_and_within_memory(mode: Mode, monkeypatch: Patch) -> None:
    """With budgets that leave much room or none; with work between changes or without."""
    chain = [make_sharding(TINY, layout) for layout in usable(TINY, 4)]
    chain += chain[::-1][1:]
    planned = {
        pair: plan_peak_bytes(TINY, *pair, mode=mode, dtype="float32", rank=RANK) for pair in pairwise(chain)
    }
    most = max(planned.values())
    for budget in (0, most, 2 * most):
        with rig(monkeypatch, budget) as ours:
            ours.weights.load(chain[0])
            for step, pair in enumerate(planned):
                if mode == "resident":
                    ours.begin(pair[0], "delta")  # forget the shardings before
                    if step % 2:
                        ours.compute()
                ours.weights.ledger.peak_bytes = ours.weights.ledger.bytes
                ours.begin(pair[1], mode)
                assert ours.weights.peak_bytes <= max(planned[pair], 0 if mode == "resident" else budget)
                if step % 3:
                    ours.compute()
                assert_holds(ours.weights, TINY, pair[1], RANK)
            assert ours.cuda.races == set()


def test_what_fits_comes_before_the_old_shardings_last_work(monkeypatch: Patch) -> None:
    """Copies ahead are not ordered behind computation, copies into memory that is freed are."""
    old, new = shardings("P4", "T4")
    for mode, budget, ahead in (("resident", 0, True), ("delta", 1 << 20, True), ("delta", 0, False)):
        with rig(monkeypatch, budget) as ours:
            ours.weights.load(old)
            ours.arrivals = Arrivals(ours.device.compute, ours.device.weights.record())
            ours.compute()
            last = ours.device.compute.record()
            change = ours.begin(new, mode)  # type: ignore[arg-type]
            first_end, last_end = change.spans[0][1], change.spans[-1][1]
            free_of = [(last.native.clock > end.native.clock).any() for end in (first_end, last_end)]  # type: ignore[attr-defined]
            assert free_of == [True, mode == "resident"]
            copied = change.spans[0][0].native.clock.sum() < first_end.native.clock.sum() - 1  # type: ignore[attr-defined]
            assert copied == ahead


def no_wait_for_earlier_changes(patch: Patch) -> None:
    plain = Arrivals.before

    def before(self: Arrivals, group: int) -> None:
        self._begun = None
        plain(self, group)

    patch.setattr(Arrivals, "before", before)


def no_wait_for_computation(patch: Patch) -> None:
    patch.setattr(RankWeights, "_behind_computation", lambda self: None)


def none(patch: Patch) -> None:
    """Nothing is taken out."""


@pytest.mark.parametrize("broken", [none, no_wait_for_earlier_changes])
def test_what_stays_may_have_come_by_a_change_that_nobody_waited_for(
    broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    one, two = shardings("P4", "T4")
    with rig(monkeypatch) as ours:
        broken(monkeypatch)
        ours.weights.load(one)
        ours.begin(two, "delta")
        ours.begin(two, "delta")  # all tensors stay as they are
        ours.compute()
        assert bool(ours.cuda.races) == (broken is not none)


@pytest.mark.parametrize("broken", [none, no_wait_for_computation])
@pytest.mark.parametrize("last", ["resident", "delta"])
def test_a_resident_sharding_that_is_dropped_may_still_be_read(
    last: Mode, broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    """Its memory goes to the third one, although that is fetched at once, into memory that is free."""
    one, two, three = shardings("P4", "T4", "P2T2")
    with rig(monkeypatch, 1 << 20) as ours:
        broken(monkeypatch)
        ours.begin(one, "delta")
        ours.compute()
        ours.begin(two, "resident")
        ours.compute()
        ours.begin(three, last)
        ours.compute()
        assert_holds(ours.weights, TINY, three, RANK)
        assert bool(ours.cuda.races) == (broken is not none)
