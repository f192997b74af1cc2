"""What a search finds: candidates, and their ranking."""

from __future__ import annotations

from dataclasses import dataclass

from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Plan
from seesaw.planning.bound import Bound
from seesaw.planning.estimate import Estimate
from seesaw.planning.setup import Limits, Setup
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.twin import Simulated
from seesaw.planning.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A plan with its limits, and what is predicted of it for the whole job."""

    plan: Plan
    limits: Limits
    workload: Workload
    estimate: Estimate
    """In closed form, of the whole job."""
    setup: Setup | None = None
    """Worked out exactly; None of plans that were not replayed."""
    simulated: Simulated | None = None
    """Of the requests that were replayed: all of them, or an even sample."""
    scale: float = 1.0
    """By which the closed form says that the whole job takes longer than what was replayed."""

    @property
    def name(self) -> str:
        """As plans are written."""
        return str(self.plan)

    @property
    def seconds(self) -> float:
        """Predicted for the whole job."""
        return self.estimate.seconds if self.simulated is None else self.simulated.seconds * self.scale

    @property
    def rate(self) -> float:
        """Prompt and output tokens per second."""
        return self.rows_per_second * (self.workload.mean_prompt + self.workload.mean_output)

    @property
    def rows_per_second(self) -> float:
        """Requests per second."""
        return self.workload.requests / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """The candidates of a search, best first."""

    model: PlannedModel
    hardware: HardwareSpec
    workload: Workload
    dtype: str
    replayed: tuple[Candidate, ...]
    others: tuple[Candidate, ...]
    """Only estimated: `setup` and `simulated` are None."""
    bound: Bound
    refused: tuple[tuple[str, str], ...]
    """(plan, why in a sentence)."""
    considered: int
    """Combinations of plan, chunk, batch and micro-batches that were estimated."""
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        """What to run."""
        return self.replayed[0]

    @property
    def best_static(self) -> Candidate | None:
        """The best of one layout for both phases; None if none was replayed."""
        return next((c for c in self.replayed if not c.plan.separate), None)
