"""`Counters`: what the scheduler has seen of the job, for statistics and for expected lengths."""

from __future__ import annotations

from dataclasses import dataclass

from seesaw.scheduling.sequence import Sequence


@dataclass(slots=True)
class Counters:
    """Running totals of the job. Expected lengths refine decisions; no correctness depends on them."""

    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    swapped_out: int = 0
    """Sequences preempted or parked by a swap-out."""
    recomputed: int = 0
    """Sequences preempted without room on the host."""
    phase_changes: int = 0

    def finish(self, sequence: Sequence) -> None:
        """Count a sequence that ended."""
        self.finished += 1
        self.prompt_tokens += sequence.prompt_tokens
        self.output_tokens += sequence.generated

    @property
    def mean_output(self) -> int:
        """Tokens that sequences generate, on average of the job so far; 32 until something has finished."""
        return self.output_tokens // self.finished if self.finished else 32
