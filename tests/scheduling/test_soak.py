"""The soak: random arrivals on tiny pools, every policy, both loops; every token is checked."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from seesaw.core.layout import Plan
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.scheduling.config import SchedulerConfig, TurnCosts
from seesaw.scheduling.integrity import check_integrity
from seesaw.scheduling.policies import create_policy
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence
from tests.scheduling.paged_stub import VOCAB, PagedStub, expected, score

STATIC = ("T1", "T2", "P2", "P4", "D2", "D2P2", "P2T2")
TWO_PHASE = ("T1->T1", "P2->P2", "P2->T2", "T2->P2", "P4->T4", "P4->D2T2", "D2P2->T4", "D4->P2T2", "T4->D4")


@dataclass
class Tally:
    """What a soak went through, so that the test can show that it forced what it claims to."""

    actions: int = 0
    finished: int = 0
    swapped_out: int = 0
    recomputed: int = 0
    phase_changes: int = 0


def random_config(rng: random.Random) -> SchedulerConfig:
    """A plan, a policy and pools so small that everything has to give."""
    separate = rng.random() < 0.6
    plan = Plan.parse(rng.choice(TWO_PHASE if separate else STATIC))
    policies = (
        ("seesaw", "prefill-first", "decode-first")
        if separate
        else ("chunked", "prefill-first", "decode-first")
    )
    block_size = rng.choice((1, 2, 4, 16))
    longest = rng.randrange(4, 60)
    need = -(-longest // block_size)
    device = (need + rng.randrange(0, 12), need + rng.randrange(0, 12))
    host = need + rng.randrange(0, 20) if separate else rng.choice((0, 1, need, 3 * need))
    return SchedulerConfig(
        plan=plan,
        policy=rng.choice(policies),  # type: ignore[arg-type]
        block_size=block_size,
        device_blocks=device if plan.reshards else (device[0], device[0]),
        host_blocks=host,
        max_model_len=longest,
        max_batch_tokens=rng.choice((1, 3, 16, 64)),
        max_running=rng.randrange(1, 9),
        overlap=rng.random() < 0.7,
        refill_threshold=rng.choice((0.0, 0.5, 1.0)),
        turn_costs=rng.choice((None, TurnCosts(step=1.0, turn=rng.random() * 40, block=rng.random()))),
        micro_batches=rng.choice((None, None, (rng.randrange(1, 6), rng.randrange(1, 6)))),
    )


class Soak:
    """One seeded job: requests arrive and are checked as they end, the books after each action."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.config = random_config(self.rng)
        self.scheduler = Scheduler(self.config, create_policy(self.config))
        self.stub = PagedStub(self.config.block_size, self.rng)
        self.left = self.rng.randrange(5, 40)
        self.sequences: list[Sequence] = []
        self.ended: set[int] = set()

    def run(self, tally: Tally) -> None:
        """Until every request has ended."""
        while self.left or self.scheduler.unfinished:
            self._arrive()
            for action in self.scheduler.schedule():
                self.stub.submit(action)
                tally.actions += 1
            check_integrity(self.scheduler)
            self._complete_some()
            for sequence in self.scheduler.take_finished():
                self._check(sequence)
        check_integrity(self.scheduler)
        assert len(self.ended) == len(self.sequences)
        assert self.scheduler.host.used == 0
        counters = self.scheduler.counters
        tally.finished += counters.finished
        tally.swapped_out += counters.swapped_out
        tally.recomputed += counters.recomputed
        tally.phase_changes += counters.phase_changes

    def _arrive(self) -> None:
        while self.left and self.rng.random() < 0.7:
            self.left -= 1
            length = self.rng.randrange(1, self.config.max_model_len)
            prompt = tuple(self.rng.randrange(VOCAB) for _ in range(length))
            sampling = SamplingParams(
                temperature=0, max_tokens=self.rng.randrange(1, 40), n=self.rng.choice((1, 1, 3))
            )
            stops = frozenset(self.rng.sample(range(VOCAB), self.rng.choice((0, 0, 4))))
            request = Request(id=f"r{self.left}", prompt_token_ids=prompt, sampling=sampling)
            request = asking(request, self.left, self.config.max_model_len)
            self.sequences += self.scheduler.add(request, stops)
        self.scheduler.more_expected = self.left > 0

    def _complete_some(self) -> None:
        was_busy = self.stub.busy
        for _ in range(self.rng.randrange(1, 6)):
            completion = self.stub.step()
            if completion is not None:
                self.scheduler.complete(completion)
                check_integrity(self.scheduler)
        stuck = not was_busy and not self.left and self.scheduler.unfinished
        assert not stuck, f"deadlock under {self.config}"

    def _check(self, sequence: Sequence) -> None:
        assert sequence.id not in self.ended, "a sequence ended twice"
        self.ended.add(sequence.id)
        prompt = list(sequence.request.prompt_token_ids)
        if sequence.request.sampling.scores_only:
            assert sequence.output_token_ids == [] and sequence.finish_reason == "length"
        else:
            assert sequence.output_token_ids == expected(prompt, sequence.limit, sequence.stop_ids)
        first = sequence.first_score
        assert sequence.prompt_logprobs == [score(prompt[:i], prompt[i]) for i in range(first, len(prompt))]
        assert (first < len(prompt)) <= (sequence.index == 0)


def asking(request: Request, number: int, longest: int) -> Request:
    """Every fourth request asks for its prompt's scores, of these every other one for nothing else: it may have
    a token more than a sequence, and often has."""
    if number % 4:
        return request
    prompt, sampling = request.prompt_token_ids, request.sampling
    if number % 8:
        start = number % 7
        sampling = replace(sampling, prompt_logprobs=0, prompt_logprobs_start=start)
    else:
        prompt += tuple(range(longest + 1 - len(prompt) if number % 3 else 1))
        sampling = replace(sampling, prompt_logprobs=2, max_tokens=0, n=1)
    return Request(id=request.id, prompt_token_ids=prompt, sampling=sampling)


@pytest.mark.parametrize("part", range(8))
def test_soak(part: int) -> None:
    """25,000 actions in each of eight parts: no leak, no deadlock, no wrong token."""
    tally, seed = Tally(), part * 1_000_000
    while tally.actions < 25_000:
        Soak(seed).run(tally)
        seed += 1
    assert tally.swapped_out > 100 and tally.recomputed > 5 and tally.phase_changes > 300, tally
