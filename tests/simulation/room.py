"""For how many ranks there is a plan with room, found without `elastic`."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from itertools import product

from seesaw.core.errors import ConfigError
from seesaw.core.layout import Layout, Plan
from seesaw.deployment import Deployment, transition_mode
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.shapes import PlannedModel


def fitting(deployment: Deployment, ranks: int, tokens: int, *, more_than: int = 0) -> int:
    """The most ranks, of so many, for which some plan of the deployment's kind has room for a sequence of `tokens`;
    0 if there is none with `more_than` ranks."""
    options = deployment.options
    limits = Limits(
        device_memory=deployment.device_memory,
        host_kv=deployment.host_kv,
        policy=options.policy,
        chunk=options.chunk,
        max_running=deployment.scheduler.max_running,
        block_size=options.block_size,
        max_model_len=tokens,
        transition=transition_mode(options),
    )
    model, separate = deployment.setup.model, deployment.plan.separate
    counts = range(ranks, more_than, -1)
    return next((count for count in counts if _fits(model, count, separate, limits)), 0)


@lru_cache(maxsize=1 << 14)
def _fits(model: PlannedModel, ranks: int, separate: bool, limits: Limits) -> bool:
    every = Layout.all(ranks)
    pairs = product(every, every) if separate else ((layout, layout) for layout in every)
    for prefill, decode in pairs:
        with suppress(ConfigError):
            set_up(model, Plan(prefill, decode, separate=separate), "float32", limits)
            return True
    return False
