"""The soak, with changes of plan in between: whatever waits or is on the host goes on under another plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seesaw.scheduling.config import SchedulerConfig
from seesaw.scheduling.integrity import check_integrity
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.sequence import Status
from tests.scheduling.test_soak import Soak, Tally, random_config


class ChangingSoak(Soak):
    """As `Soak`; now and then everything comes to rest, and another plan takes over on new devices."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.changes = 0
        self.taken_along = 0

    def _arrive(self) -> None:
        super()._arrive()
        if self.changes < 6 and self.rng.random() < 0.3 and self._only_running():
            self._change()

    def _only_running(self) -> bool:
        """Whether all residents can be parked."""
        residents = [s for r in self.scheduler.replicas for g in r.groups for s in g.sequences.values()]
        return all(s.status is Status.RUNNING for s in residents)

    def _change(self) -> None:
        scheduler, stub = self.scheduler, self.stub
        for action in scheduler.retire():
            stub.submit(action)
        check_integrity(scheduler)
        while scheduler.in_flight:
            completion = stub.step()
            if completion is not None:
                scheduler.complete(completion)
                check_integrity(scheduler)
        self.taken_along += sum(s.generated > 0 for s in scheduler.live())
        self.config = self._other_config()
        stub.epoch += 1
        scheduler.reconfigure(self.config, create_policy(self.config))
        check_integrity(scheduler)
        self.changes += 1

    def _other_config(self) -> SchedulerConfig:
        """Any plan over the same host buffer that has room for what there is."""
        old = self.config
        while True:
            new = random_config(self.rng)
            blocks = -(-old.max_model_len // old.block_size)
            device = tuple(max(blocks, count) for count in new.device_blocks)
            if not new.plan.separate or old.host_blocks >= blocks:
                return replace(
                    new,
                    block_size=old.block_size,
                    device_blocks=device,  # type: ignore[arg-type]
                    host_blocks=old.host_blocks,
                    max_model_len=old.max_model_len,
                )


@pytest.mark.parametrize("part", range(2))
def test_soak_with_changes_of_plan(part: int) -> None:
    """No leak, no deadlock, no wrong token, every sequence once."""
    tally, seed, changes, taken_along = Tally(), 7_000_000 + part * 1_000_000, 0, 0
    while tally.actions < 8_000:
        soak = ChangingSoak(seed)
        soak.run(tally)
        changes, taken_along, seed = changes + soak.changes, taken_along + soak.taken_along, seed + 1
    assert changes > 50 and taken_along > 50, (changes, taken_along)


def test_a_plan_is_not_changed_while_something_is_in_flight() -> None:
    soak = Soak(3)
    while not soak.scheduler.in_flight:
        soak._arrive()
        for action in soak.scheduler.schedule():
            soak.stub.submit(action)
    with pytest.raises(AssertionError, match="in flight"):
        soak.scheduler.reconfigure(soak.config, create_policy(soak.config))
