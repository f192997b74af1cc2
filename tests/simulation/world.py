"""What a seed stands for: a model, a plan, budgets, rows, and what goes wrong when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from seesaw.core.errors import ConfigError
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.core.node import Place
from seesaw.core.request import Request
from seesaw.core.sampling import SamplingParams
from seesaw.deployment import Deployment
from seesaw.options import Options
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import PlannedModel
from seesaw.scheduling.config import TurnCosts
from tests.simulation.toy import MODEL_EOS, VOCAB

DTYPE = "float32"
SHAPES = ((8, 8, 2), (3, 6, 3), (4, 4, 4))
"""Layers, query heads, KV heads. The weights are small beside the KV, so that pools stay tiny on few ranks too."""
LONGEST = 64
"""Tokens that the model itself can take."""
WORLDS = (4, 2, 3, 1, 2, 4, 4, 6, 8)
POLICIES = {
    True: ("seesaw", "prefill-first", "decode-first"),
    False: ("chunked", "prefill-first", "decode-first"),
}
FAULTS = ("die",) * 5 + ("die in start",) * 2 + ("fail", "startup", "killed")


def _model(layers: int, heads: int, kv_heads: int) -> PlannedModel:
    spec = ModelSpec(
        family="llama",
        layers=layers,
        hidden=2,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        ffn=8,
        vocab=VOCAB,
        max_position=LONGEST,
        rms_eps=1e-5,
        rope=RopeSpec(),
        dtype="float32",
        eos_token_ids=(MODEL_EOS,),
    )
    return PlannedModel(name="toy", spec=spec, weight_bits=32, kv_bits=32)


MODELS = tuple(_model(*shape) for shape in SHAPES)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at event number `at` of the ranks (an action taken in, a step of the clock)."""

    at: int
    kind: str
    share: float
    """Of the ranks that are there; one at least."""
    grace: int
    """Events that pass before the control process hears of it."""


@dataclass(slots=True)
class Job:
    """Everything a seed decides but the moments that the ranks choose while it runs."""

    seed: int
    rng: random.Random
    """For what is decided while it runs."""
    deployment: Deployment
    speaks: bool
    """Whether there is a tokeniser."""
    rows: list[Request]
    faults: list[Fault]
    closes: list[int]
    """After so many outputs the consumer closes the iterator, once each."""
    source_fails: int | None
    """The source raises, once, when it is asked for this row."""
    auto: bool
    changes: int
    """Changes of plan that `plan="auto"` may make."""
    slow: frozenset[int]
    """Ranks that take many times as long."""
    pace: tuple[float, float, float]
    """Mean durations of a Forward, a copy, a transition."""
    lag: float
    """Mean time from an end until it is reported."""
    window: float
    """What ends within it is reported together."""


def job_of(seed: int, size: int) -> Job:
    """The job of a seed; `size` bounds what it is made of."""
    rng = random.Random(seed)
    deployment = _deployment(rng, size)
    longest = deployment.memory.max_model_len
    wide = rng.random() < 0.01
    count = rng.randrange(90, 130) if wide else rng.randrange(1, 3 + size)
    speaks = rng.random() < 0.6
    calm = rng.random() < 0.2
    faults = [] if calm else _faults(rng, size)
    return Job(
        seed=seed,
        rng=random.Random(rng.randrange(1 << 32)),
        deployment=deployment,
        speaks=speaks,
        rows=[_row(rng, i, 6 if wide else longest, 2 if wide else 16, speaks) for i in range(count)],
        faults=faults,
        closes=sorted(rng.randrange(0, count + 1) for _ in range(rng.choice((0, 0, 0, 1, 2)))),
        source_fails=rng.randrange(count) if rng.random() < 0.05 else None,
        auto=rng.random() < 0.4,
        changes=rng.randrange(0, 4),
        slow=frozenset(r for r in range(deployment.plan.world) if rng.random() < 0.15),
        pace=(rng.choice((0.1, 1.0, 5.0)), rng.choice((0.1, 1.0, 20.0)), rng.choice((0.1, 1.0, 20.0))),
        lag=rng.choice((0.0, 0.5, 5.0)),
        window=rng.choice((0.0, 0.0, 0.5, 5.0)),
    )


def _faults(rng: random.Random, size: int) -> list[Fault]:
    last, faults = rng.choice((15, 60, 60, 200)) + 10 * size, []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(last), rng.choice(FAULTS)
        share, grace = rng.choice((0.0, 0.0, 0.0, 0.5, 0.5, 1.0)), rng.choice((0, 0, 3, 30))
        if kind in ("die in start", "startup"):  # there is a start to be disturbed only if one died before
            faults.append(Fault(at, "die", 0.0, grace))
        faults.append(Fault(at, kind, share, grace))
    return sorted(faults, key=lambda fault: fault.at)


# ---- rows ------------------------------------------------------------------------------------------------------


def _row(rng: random.Random, number: int, longest: int, most: int, speaks: bool) -> Request:
    kind = rng.random()
    length = (
        rng.randrange(1, max(2, longest))
        if kind < 0.9
        else rng.choice((0, longest, longest - 1, longest + 3))
    )
    prompt = [rng.randrange(VOCAB) for _ in range(length)]
    if prompt and rng.random() < 0.02:
        prompt[-1] = VOCAB + rng.randrange(3)
    return Request(id=f"row {number}", prompt_token_ids=tuple(prompt), sampling=_sampling(rng, most, speaks))


def _sampling(rng: random.Random, most: int, speaks: bool) -> SamplingParams:
    tokens = rng.randrange(1, most + 1)
    fields: dict[str, Any] = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.5:
        return SamplingParams(**fields)
    fields |= {
        "n": rng.choice((1, 1, 2, 3)),
        "temperature": rng.choice((0.0, 0.7)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.2)),
        "min_tokens": rng.randrange(0, tokens + 1) if rng.random() < 0.3 else 0,
        "stop_token_ids": tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 5)))),
        "logprobs": rng.choice((None, None, 0, 2)),
    }
    if rng.random() < (0.4 if speaks else 0.02):
        fields["stop"] = tuple("".join(rng.choices("abcde", k=rng.randrange(1, 4))) for _ in range(2))
        fields["include_stop_str_in_output"] = rng.random() < 0.5
    return SamplingParams(**fields)


# ---- plan and budgets ------------------------------------------------------------------------------------------


def random_plan(rng: random.Random, world: int, *, separate: bool) -> Plan:
    """Any plan of so many ranks."""
    every = Layout.all(world)
    decode = rng.choice(every)
    return Plan(rng.choice(every) if separate else decode, decode, separate=separate)


def _deployment(rng: random.Random, size: int) -> Deployment:
    """A plan with room for a few sequences, where there is one that a model divides into."""
    while True:
        model = rng.choice(MODELS)
        world = rng.choice(WORLDS[: 3 + size])
        plan = random_plan(rng, world, separate=rng.random() < 0.65)
        try:
            return _within(rng, model, plan)
        except ConfigError:
            continue


def _within(rng: random.Random, model: PlannedModel, plan: Plan) -> Deployment:
    block_size = rng.choice((1, 2, 4, 16))
    longest = rng.randrange(4, 48)
    options = Options(
        model="toy",
        device="cpu",
        plan=str(plan),
        max_model_len=longest if rng.random() < 0.75 else None,
        policy=rng.choice((None, rng.choice(POLICIES[plan.separate]))),
        chunk=rng.choice((1, 3, 16, 64)),
        max_running=rng.randrange(1, 9),
        block_size=block_size,
        transition=rng.choice(("auto", "resident", "delta", "reload")),
        overlap=rng.random() < 0.7,
        on_rank_loss="stop" if rng.random() < 0.05 else "continue",
        seed=rng.randrange(1 << 16),
    )
    need = -(-longest // block_size)
    block = model.kv_bytes_per_token() * block_size
    host = need + rng.randrange(0, 3 * need) if plan.separate else rng.choice((0, 1, need, 3 * need))
    smaller = Plan.parse("T1") if rng.random() < 0.75 else plan
    limits = _limits(options, device=1 << 30, host=block * host)
    device = _device_memory(model, smaller, limits, need + rng.randrange(0, 2 * need + 2))
    limits = replace(limits, device_memory=device)
    setup = set_up(model, plan, DTYPE, limits)
    setup = replace(setup, scheduler=_with_thresholds(rng, setup))
    return Deployment(
        options=options,
        setup=setup,
        dummy=True,
        device_memory=device,
        host_kv=block * host,
        places=tuple(Place(cores=[rank]) for rank in range(plan.world)),
        hardware="simulated",
    )


def _limits(options: Options, *, device: int, host: int) -> Limits:
    return Limits(
        device_memory=device,
        host_kv=host,
        policy=options.policy,
        chunk=options.chunk,
        max_running=options.max_running or 1,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        transition=None if options.transition == "auto" else options.transition,  # type: ignore[arg-type]
        overlap=options.overlap,
        seed=options.seed,
    )


def _device_memory(model: PlannedModel, plan: Plan, limits: Limits, blocks: int) -> int:
    """Bytes with which a rank of `plan` has room for so many blocks."""
    memory = set_up(model, plan, DTYPE, replace(limits, max_model_len=None)).memory
    block = max(-(-pool // min(memory.device_blocks)) for pool in memory.pool)
    return max(w + s for w, s in zip(memory.weights, memory.workspace, strict=True)) + blocks * block


def _with_thresholds(rng: random.Random, setup: Setup) -> Any:
    """When to turn, and how many micro-batches take turns."""
    return replace(
        setup.scheduler,
        refill_threshold=rng.choice((0.0, 0.5, 1.0)),
        turn_costs=rng.choice((None, TurnCosts(step=1.0, turn=rng.random() * 40, block=rng.random()))),
        micro_batches=rng.choice((None, None, (rng.randrange(1, 6), rng.randrange(1, 6)))),
    )


class SourceError(Exception):
    """The file of rows could not be read on."""


def source(rows: list[Request], fails_at: int | None) -> Iterator[Request]:
    """The rows, one by one, until it fails."""
    for number, row in enumerate(rows):
        if number == fails_at:
            raise SourceError(f"row {number}")
        yield row
