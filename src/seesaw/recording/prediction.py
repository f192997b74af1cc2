"""What the planner predicts for a run that was made, given the lengths that its rows turned out to have."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan
from seesaw.core.model_spec import DType
from seesaw.recording.record import Run, RunSetup

logger = logging.getLogger(__name__)

_REPLAYED_TOKENS = 200_000
"""Output tokens that are replayed at most: about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of the whole run, as the engine would have counted them."""

    seconds: float
    phases: dict[str, float]
    """As `EngineStats.seconds_per_phase`: the waits for the ranks."""
    transitions: float
    """Changes of layout."""
    replayed: int
    """Sequences whose schedule was replayed."""
    sequences: int
    """Sequences of the run."""


def predict(run: Run) -> Prediction | str:
    """The twin's answer for a run, or in a few words why there is none. Takes a second or two."""
    setup = run.setup
    sequences = sum(run.history.prompts.values())
    if setup is None or setup.hardware is None:
        return "there were no figures of the machine to predict from"
    if run.state != "finished":
        return "the run did not come to its end"
    if len({plan for _, plan in run.plans if plan != "auto"}) != 1:
        return "the plan changed while it ran"
    if not sequences:
        return "no sequence ended"
    try:
        return _replay(run, setup, sequences)
    except ConfigError as error:
        logger.debug("no prediction", exc_info=True)
        return str(error)


def _replay(run: Run, setup: RunSetup, sequences: int) -> Prediction:
    import numpy as np

    from seesaw.planning.device_costs import costs_of
    from seesaw.planning.scoring import SearchOptions
    from seesaw.planning.search import search
    from seesaw.planning.shapes import stored_as
    from seesaw.planning.workloads import Workload

    assert setup.hardware is not None
    dtype = cast(DType, setup.dtype)
    prompt, output = np.array(run.history.sample, dtype=np.int64).T
    workload = Workload("the run", prompt, np.maximum(output, 1), represented=sequences)
    options = SearchOptions(
        device_memory=setup.device_memory,
        host_kv=setup.host_kv,
        chunk=setup.chunk,
        max_running=setup.max_running,
        plans=(Plan.parse(setup.plan),),
        policy=setup.policy,
        max_model_len=setup.max_model_len,
        block_size=setup.block_size,
        transition=setup.transition if setup.transition != "auto" else None,  # type: ignore[arg-type]
        overlap=setup.overlap,
        costs=costs_of(setup.hardware.device),
        replays=1,
        replayed_tokens=_REPLAYED_TOKENS,
    )
    model = stored_as(setup.spec, dtype, setup.model)
    best = search(model, setup.hardware, workload, setup.dtype, options=options).best
    assert best.simulated is not None, "what is best was replayed"
    scale = best.seconds / best.simulated.seconds
    return Prediction(
        seconds=best.seconds,
        phases={phase: seconds * scale for phase, seconds in best.simulated.waited.items()},
        transitions=best.simulated.transitions * scale,
        replayed=best.simulated.requests,
        sequences=sequences,
    )
