"""What runs on when ranks are lost: the plan for those that are left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from seesaw.core.errors import ConfigError, WorkerError
from seesaw.core.layout import Layout, Plan
from seesaw.deployment import Deployment, limits_of, redeploy

logger = logging.getLogger(__name__)

_SHORTER = (
    "the ranks that are left have no room for sequences of %d tokens, which all of them had: from here on, rows that "
    "need more than %d fail, and can be run again (--retry-errors) on more ranks"
)


def without(deployment: Deployment, error: WorkerError, *, longest: int) -> Deployment:
    """The same model under a plan for the ranks that are not `error.lost`, in the same memory of each.

    As many ranks as can be used are; among their plans the one that comes first by `plans`. A plan must have room
    for sequences as long as before. Where no plan has, and memory alone set that bound, sequences of `longest` tokens
    must fit, and a log line says what is to be expected. Raises `WorkerError` if there is none.
    """
    places = tuple(place for rank, place in enumerate(deployment.places) if rank not in error.lost)
    before = deployment.memory.max_model_len
    by_memory = deployment.options.max_model_len is None
    room = limits_of(deployment.options, deployment.device_memory, deployment.host_kv)
    for tokens in (before, longest) if by_memory else (before,):
        wanted = replace(room, max_running=deployment.scheduler.max_running, max_model_len=tokens)
        for ranks in range(len(places), 0, -1):
            left = replace(deployment, places=places[:ranks], hardware="ranks were lost")
            for plan in plans(ranks, separate=deployment.plan.separate):
                with suppress(ConfigError):
                    found = redeploy(left, plan, wanted)
                    if tokens < before:
                        logger.warning(_SHORTER, before, tokens)
                    return found
    raise WorkerError(
        f"{error}; {_count(len(places))} left, on which no plan has room for the model and a sequence of "
        f"{longest if by_memory else before} tokens",
        rank=error.rank,
        phase=error.phase,
        details=error.details,
    )


def plans(ranks: int, *, separate: bool) -> Iterator[Plan]:
    """Plans for so many ranks, the likeliest to be fast first: pipelines prefill, tensor parallelism decodes."""
    every = Layout.all(ranks)
    for decode in sorted(every, key=lambda layout: (-layout.tp, -layout.dp)):
        if not separate:
            yield Plan(decode, decode, separate=False)
            continue
        for prefill in sorted(every, key=lambda layout: (-layout.pp, -layout.dp)):
            yield Plan(prefill, decode, separate=True)


def _count(ranks: int) -> str:
    return "no rank is" if ranks == 0 else f"{ranks} rank is" if ranks == 1 else f"{ranks} ranks are"
