"""What the closed form needs to know of a workload: means, and how a batch of it thins out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seesaw.planning.workload_files import Floats
from seesaw.planning.workloads import Workload

_STEPS = 24
"""Points of a survival curve."""


@dataclass(frozen=True, slots=True, eq=False)
class Survival:
    """How long the sequences of a batch go on decoding: `spans[i]` steps with the share `alive[i]` of them."""

    spans: Floats
    alive: Floats

    @property
    def steps(self) -> float:
        """Until the last one ends."""
        return float(self.spans.sum())

    @property
    def tokens(self) -> float:
        """Per sequence."""
        return float((self.spans * self.alive).sum())

    def until(self, share: float) -> Survival:
        """Up to the point where only `share` of them are left."""
        kept = self.alive > share
        return Survival(self.spans[kept], self.alive[kept])


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of the requests of a job; lengths in tokens. Decoding begins with the second token of an output."""

    requests: int
    prompt: float
    """Mean tokens of a prompt."""
    output: float
    hosted: float
    """Mean tokens that a request leaves in the host buffer: its prompt, unless it ends with its first token."""
    pairs: float
    """Mean (query, key) pairs of a prompt."""
    running_prompt: float
    """Mean prompt of the sequences that are decoding at a time: those with long outputs are there longer."""
    context: float
    """Mean keys that a decoding sequence reads."""
    held: float
    """Tokens for which the scheduler keeps room per decoding sequence: what it has, or is expected to reach."""
    longest: int
    fresh: Survival
    """Of sequences that begin to decode together."""
    running: Survival
    """Of those that are decoding at some time of a steady state."""

    @property
    def steps(self) -> float:
        """Decode steps of a request, on average."""
        return self.output - 1.0


def statistics(workload: Workload) -> Statistics:
    """Statistics of a workload."""
    prompt, output = workload.prompt.astype(np.float64), workload.output.astype(np.float64)
    steps = output - 1.0
    mean, total = float(output.mean()), max(float(steps.sum()), 1e-9)
    # Over a sequence's life of o tokens the scheduler expects max(mean, what it has generated).
    expected = np.where(output <= mean, mean * output, (mean * mean + output * output) / 2)
    return Statistics(
        requests=workload.requests,
        prompt=float(prompt.mean()),
        output=mean,
        hosted=float((prompt * (steps > 0)).mean()),
        pairs=float((prompt * (prompt + 1) / 2).mean()),
        running_prompt=float((prompt * steps).sum() / total),
        context=float((steps * (prompt + output / 2)).sum() / total),
        held=float((prompt * output).sum() / output.sum() + expected.sum() / output.sum()),
        longest=workload.longest,
        fresh=_fresh(steps),
        running=_running(steps),
    )


def _fresh(steps: Floats) -> Survival:
    ends = np.quantile(steps, (np.arange(_STEPS) + 0.5) / _STEPS)
    ends = np.append(ends, steps.max())
    alive = np.append(1.0 - np.arange(_STEPS) / _STEPS, 1.0 / len(steps))
    return Survival(np.diff(ends, prepend=0.0), alive)


def _running(steps: Floats) -> Survival:
    """Of what is left of a sequence met at a random time: its distribution has the density P(steps > t)."""
    ordered = np.sort(steps)
    spans = np.diff(ordered, prepend=0.0)
    above = (len(ordered) - np.arange(len(ordered))) / len(ordered)
    mass = np.cumsum(spans * above)
    if mass[-1] <= 0:
        return Survival(np.zeros(1), np.ones(1))
    shares = (np.arange(_STEPS) + 0.5) / _STEPS * mass[-1]
    ends = np.interp(shares, np.append(0.0, mass), np.append(0.0, ordered))
    return Survival(np.diff(ends, prepend=0.0), 1.0 - np.arange(_STEPS) / _STEPS)
