"""The policies: one decides for plans with two phases, one for static plans that mix them."""

from __future__ import annotations

from seesaw.scheduling.config import SchedulerConfig
from seesaw.scheduling.policies.base import Policy
from seesaw.scheduling.policies.mixed import MixedPolicy
from seesaw.scheduling.policies.phased import PhasedPolicy

__all__ = ["Policy", "create_policy"]


def create_policy(config: SchedulerConfig) -> Policy:
    """The policy `config.policy` for `config.plan`."""
    return PhasedPolicy(config.policy) if config.plan.separate else MixedPolicy(config.policy)
