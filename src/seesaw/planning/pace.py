"""`Pace`: how fast one layout prefills, decodes, and does both in mixed batches, in a steady state.

Closed form, from `LayoutCost`. A pipeline with g micro-batches in turn takes, for a Forward of each,
`max(g * slowest stage, sum of stages + hand-overs)`: the slowest stage is always busy, or each micro-batch waits for
its own way through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout
from seesaw.planning.cost import LayoutCost, Work
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.statistics import Statistics, Survival


@dataclass(slots=True, eq=False)
class Pace:
    """Of all replicas of `layout` with these stages (numbers of layers; `carried` as in `LayoutCost`). Rates are of
    the node."""

    model: PlannedModel
    hardware: HardwareSpec
    layout: Layout
    stages: Sequence[int]
    dtype: str
    of: Statistics
    carried: Sequence[float] = ()
    _cost: LayoutCost = field(init=False)
    _forwards: dict[tuple[int, int, int], Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cost = LayoutCost(self.model, self.hardware, self.layout, self.stages, self.dtype, self.carried)

    def prefill(self, chunk: int) -> tuple[float, float]:
        """Seconds per token of prompts, and seconds until a pipeline is full: Forwards of `chunk` tokens."""
        ending = chunk / self.of.prompt
        fewer, share = int(ending), ending - int(ending)  # so many prompts end with a Forward, or one more
        stages = self._forward(chunk, fewer, 0)
        if share:
            more = self._forward(chunk, fewer + 1, 0)
            stages = [a + share * (b - a) for a, b in zip(stages, more, strict=True)]
        slowest = max(stages)
        return slowest / (chunk * self.layout.dp), self._through(stages, chunk) - slowest

    def step(self, sequences: float, groups: int) -> float:
        """Seconds of a decode step of all `sequences` of one replica."""
        return self.mixed(sequences, 0.0, groups)

    def mixed(self, sequences: float, prompt_tokens: float, groups: int) -> float:
        """Seconds in which each of `groups` micro-batches runs a Forward: `sequences` of them decode in all, and
        `prompt_tokens` of prompts go along."""
        rows, tokens = max(1, round(sequences / groups)), round(prompt_tokens / groups)
        sampled = rows + round(tokens / self.of.prompt)
        stages = self._forward(tokens, sampled, rows)
        return max(groups * max(stages), self._through(stages, tokens + rows))

    def lumpy(self, sequences: float, prompt_tokens: float, groups: int, carrying: float) -> float:
        """As `mixed`, where only `carrying` of the micro-batches have prompts with them, of `prompt_tokens` each."""
        rows, tokens = max(1, round(sequences / groups)), round(prompt_tokens)
        stages = self._forward(tokens, rows + round(tokens / self.of.prompt), rows)
        plain = max(self._forward(0, rows, rows)) if carrying < groups else 0.0
        busy = carrying * max(stages) + (groups - carrying) * plain
        return max(busy, self._through(stages, tokens + rows))

    def thinning(self, sequences: float, survival: Survival, groups: int) -> float:
        """Seconds of the decode steps of a replica's batch that is not refilled."""
        return float(
            sum(
                span * self.step(max(1.0, sequences * alive), groups)
                for span, alive in zip(survival.spans.tolist(), survival.alive.tolist(), strict=True)
                if span
            )
        )

    def _through(self, stages: Sequence[float], tokens: int) -> float:
        """Seconds of the way through all stages."""
        return sum(stages) + (len(stages) - 1) * self._cost.hand_over(tokens)

    def _forward(self, tokens: int, sampled: int, rows: int) -> Sequence[float]:
        """Seconds of each stage, for `tokens` of prompts and `rows` decode steps."""
        key = tokens, sampled, rows
        known = self._forwards.get(key)
        if known is None:
            work = Work(
                tokens=tokens + rows,
                sampled=sampled,
                pairs=tokens * self.of.pairs / self.of.prompt,
                keys=rows * self.of.context,
            )
            attention, cost = self._cost.attention(work), self._cost
            alike: dict[tuple[int, bool, bool, float, float], float] = {}
            known = []
            for index in range(len(self.stages)):
                kind = cost.kind(index)
                if kind not in alike:
                    fixed = cost.by_rows(index, work.tokens, work.sampled)
                    alike[kind] = fixed.with_attention(cost.attention_of(index, attention))
                known.append(alike[kind])
            self._forwards[key] = known
        return known
