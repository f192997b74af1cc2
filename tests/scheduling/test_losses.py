"""The soak, with ranks that die at any moment: what is whole on the host goes on, the rest is computed again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from seesaw.core.actions import Completion
from seesaw.scheduling.integrity import check_integrity
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.sequence import Status
from tests.scheduling.paged_stub import PagedStub
from tests.scheduling.test_reconfigure import ChangingSoak
from tests.scheduling.test_soak import Tally


@dataclass
class Losses:
    """What the soak went through."""

    count: int = 0
    in_flight: int = 0
    """Losses with something in flight."""
    kept: int = 0
    """Sequences that stayed on the host."""
    rescued: int = 0
    """Sequences that were on their way from the host."""
    restarted: int = 0
    """Sequences that had generated tokens and went on from them."""


class LosingSoak(ChangingSoak):
    """As `ChangingSoak`, but nothing comes to rest first: devices and all that is in flight are gone at once."""

    def __init__(self, seed: int, losses: Losses) -> None:
        super().__init__(seed)
        self.losses = losses
        self._before = 0

    def _complete_some(self) -> None:
        if not self._lose_perhaps():
            super()._complete_some()
            self._lose_perhaps()

    def _lose_perhaps(self) -> bool:
        loses = self.losses.count - self._before < 10 and self.rng.random() < 0.1
        if loses:
            self._lose()
        return loses

    def _arrive(self) -> None:
        super(ChangingSoak, self)._arrive()

    def _lose(self) -> None:
        scheduler, losses = self.scheduler, self.losses
        losses.count += 1
        losses.in_flight += bool(scheduler.in_flight)
        status = {s.id: s.status for s in scheduler.live()}
        tokens = {s.id: list(s.tokens) for s in scheduler.live()}
        restarted = scheduler.lose_devices()
        for sequence in scheduler.live():
            before = status[sequence.id]
            assert sequence.tokens == tokens[sequence.id], "a token was lost"
            stays = before in (Status.HOST, Status.SWAPPING_IN)
            assert sequence.status is (Status.HOST if stays else Status.WAITING)
            losses.kept += before is Status.HOST
            losses.rescued += before is Status.SWAPPING_IN
            losses.restarted += not stays and sequence.generated > 0
        assert restarted == sum(
            s not in (Status.WAITING, Status.HOST, Status.SWAPPING_IN) for s in status.values()
        )
        self.stub = _after(self.stub)
        self.config = self._other_config()
        scheduler.reconfigure(self.config, create_policy(self.config))
        check_integrity(scheduler)


def _after(stub: PagedStub) -> PagedStub:
    """New ranks over the same host memory. Some copies to it may have ended without a word, some in the middle."""
    for copy in [c for c in stub._copies if c.out and stub.rng.random() < 0.5]:
        copy.pairs = copy.pairs[: stub.rng.randrange(len(copy.pairs) + 1)]
        stub._copy(copy)
    return PagedStub(stub.block_size, stub.rng, host=stub.host, epoch=stub.epoch + 1)


@pytest.mark.parametrize("part", range(2))
def test_soak_with_losses(part: int) -> None:
    """No leak, no deadlock, no wrong token, every sequence once, and no token computed twice for what was kept."""
    tally, losses, seed = Tally(), Losses(), 9_000_000 + part * 1_000_000
    while tally.actions < 12_000:
        soak = LosingSoak(seed, losses)
        soak._before = losses.count
        soak.run(tally)
        seed += 1
    assert losses.count > 100 and losses.in_flight > 50, losses
    assert losses.kept > 50 and losses.rescued > 10 and losses.restarted > 50, losses


def test_late_completions_are_not_taken() -> None:
    """The engine drops what lost ranks had still to say; were it not so, the books would notice."""
    soak = LosingSoak(5, Losses())
    late: list[Completion] = []
    while not (soak.scheduler.in_flight and late):
        soak._arrive()
        for action in soak.scheduler.schedule():
            soak.stub.submit(action)
        completion = soak.stub.step()
        late += [completion] if completion is not None else []
    soak.scheduler.lose_devices()
    with pytest.raises(KeyError):
        soak.scheduler.complete(late[0])
