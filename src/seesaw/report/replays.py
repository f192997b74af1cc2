"""Replays of plans in the twin as people read them on a terminal: one in full, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seesaw.core.units import format_bytes
from seesaw.report.causes import PHASES, Job, bound_by, limits, time_text
from seesaw.report.text import (
    NONE,
    Column,
    Grid,
    breakdown,
    count,
    in_lines,
    line,
    plain,
    rate,
    share,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from seesaw.planning.bound import Bound
    from seesaw.planning.memory import MemoryPlan
    from seesaw.planning.setup import Limits, Setup
    from seesaw.planning.twin import Latency, Simulated

_BARS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 60
_MOST_JOBS = 5
"""Of a table of causes side by side."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A plan that was replayed, or why it could not be."""

    name: str
    limits: Limits
    setup: Setup | None = None
    simulated: Simulated | None = None
    error: str | None = None

    @property
    def job(self) -> Job:
        """For the tables."""
        assert self.simulated is not None, f"{self.name} was not replayed"
        return Job(self.name, self.simulated)


def show_replay(replay: Replay, bound: Bound, console: Console) -> None:
    """Everything about one plan."""
    job, setup = replay.job, replay.setup
    assert setup is not None
    for piece in settings(setup):
        console.print(piece)
    console.print()
    console.print(plain(result(job), style="bold"))
    console.print()
    console.print(phases_table(job))
    console.print(breakdown([job]))
    for piece in details(job, bound):
        console.print(piece)
    if job.replay.latency is not None:
        console.print()
        console.print(latency_table(job.replay.latency))


def settings(setup: Setup) -> list[RenderableType]:
    """The plan as worked out: limits and memory."""
    scheduler, memory = setup.scheduler, setup.memory
    plan = (
        f"{setup.plan}: policy {scheduler.policy}, chunk of {scheduler.max_batch_tokens:,} tokens, "
        f"at most {scheduler.max_running:,} sequences on a replica"
    )
    if setup.plan.reshards:
        plan += f", weights change over by {memory.mode}"
    ranks = f"{memory_text(memory)}; sequences up to {memory.max_model_len:,} tokens"
    tokens = memory.host_blocks * scheduler.block_size
    size = format_bytes(tokens * setup.model.kv_bytes_per_token())
    host = f"{size}, room for the KV of {tokens:,} tokens" if tokens else "none"
    return [line("plan", plan), line("memory", ranks), line("buffer", host)]


def memory_text(memory: MemoryPlan) -> str:
    """All that the fullest rank takes."""
    return f"on the fullest rank {memory.describe(memory.fullest)}"


def result(job: Job) -> str:
    """What came out, in one sentence."""
    done = job.replay
    text = (
        f"{job.name}: {rate(done.rate)} tokens/s, {rate(done.rows_per_second)} rows/s; {done.requests:,} requests "
        f"({done.prompt_tokens:,} tokens in, {done.output_tokens:,} out) in {time_text(done.seconds)}"
    )
    return f"{text}; bound by {bound_by(job)}."


def phases_table(job: Job) -> Grid:
    """Time, Forwards and their size by phase."""
    columns = [
        "time",
        "share",
        "Forwards",
        "tokens\na Forward",
        "sequences\na Forward",
        "tokens fed\na second",
    ]
    grid = Grid("Phases", [Column("", left=True), *(Column(name) for name in columns)])
    for phase, report in job.replay.phases.items():
        forwards = report.forwards
        fed = rate(report.tokens / report.seconds) if report.tokens and report.seconds else NONE
        grid.add(
            PHASES[phase],
            time_text(report.seconds),
            share(job.share(report.seconds)),
            f"{forwards:,}" if forwards else NONE,
            f"{report.tokens / forwards:,.0f}" if forwards else NONE,
            f"{report.batch:,.1f}" if forwards else NONE,
            fed,
        )
    return grid


def details(job: Job, bound: Bound) -> list[RenderableType]:
    """Limits, changes of layout, buffer, bound."""
    done = job.replay
    pieces = [line("limits", limits(job))]
    if done.transitions:
        span = done.phases["transition"].seconds if "transition" in done.phases else 0.0
        moves = f"{count(done.transitions, 'transition')} of {time_text(span / done.transitions)} on average"
        pieces.append(line("changes", moves))
    preempted = (
        f"{count(done.swapped_out, 'sequence')} swapped out to make room, {done.recomputed:,} computed again"
    )
    pieces.append(line("preempted", preempted))
    most = max((fill for _, fill in done.buffer), default=0.0)
    if most:
        pieces.append(
            line("buffer", f"{fill_line(done)}\nfrom the start to the end; {share(most)} full at most")
        )
    if done.latency is None:  # else the job takes as long as its requests take to arrive
        least = f"no plan on this node takes less than {time_text(bound.seconds)}; "
        pieces.append(line("bound", f"{least}{job.name} reaches {share(bound.seconds / job.seconds)} of it"))
    return pieces


def fill_line(done: Simulated) -> str:
    """Fill of the host buffer over the job, a character for each 60th of it; the highest where it is fullest."""
    highest = [0.0] * _BAR_COLUMNS
    points = list(done.buffer)
    for (start, fill), (end, _) in zip(points, [*points[1:], (done.seconds, 0.0)], strict=True):
        first, last = (min(int(at / done.seconds * _BAR_COLUMNS), _BAR_COLUMNS - 1) for at in (start, end))
        highest[first : last + 1] = [max(before, fill) for before in highest[first : last + 1]]
    most = max(highest)
    return "".join(_BARS[round(fill / most * (len(_BARS) - 1))] if fill else " " for fill in highest)


def latency_table(latency: Latency) -> Grid:
    """Percentiles in seconds."""
    columns = [Column("", left=True), *(Column(f"{p}th percentile") for p in latency.ttft)]
    grid = Grid("Latencies, requests arriving as the workload says", columns)
    for name, values in (
        ("to the first token", latency.ttft),
        ("between tokens", latency.inter_token),
        ("whole request", latency.end_to_end),
    ):
        grid.add(name, *(time_text(values[mark]) if mark in values else NONE for mark in latency.ttft))
    return grid


# ---- several ----------------------------------------------------------------------------------------------


def show_comparison(replays: Sequence[Replay], bound: Bound, console: Console) -> None:
    """Several plans side by side, ratios over the first."""
    done = [replay for replay in replays if replay.simulated is not None]
    if done:
        console.print(comparison_table(done, bound))
        console.print(breakdown([replay.job for replay in done][:_MOST_JOBS], by_phase=False))
    if any(replay.job.replay.latency is not None for replay in done):
        console.print(latencies_table(done))
    for replay in replays:
        if replay.error is not None:
            console.print(line("refused", f"{replay.name}: {replay.error}"))


def comparison_table(replays: Sequence[Replay], bound: Bound) -> Grid:
    """A row for each plan that could be replayed."""
    columns = [
        Column("plan", left=True),
        Column("tokens/s"),
        Column("rows/s", spare=4),
        Column("× first"),
        Column("whole\nseconds"),
        Column("prefill\nseconds", spare=2),
        Column("decode\nseconds", spare=1),
        Column("transi-\ntions"),
        Column("of\nbound", spare=3),
        Column("bound by", left=True, wraps=True),
    ]
    grid = Grid("Plans, in the order given", columns)
    for replay in replays:
        job = replay.job
        grid.add(
            in_lines(replay.name),
            rate(job.replay.rate),
            rate(job.replay.rows_per_second),
            f"{job.replay.rate / replays[0].job.replay.rate:.2f}",
            rate(job.seconds),
            *(_phase_seconds(job, phase) for phase in ("prefill", "decode")),
            f"{job.replay.transitions:,}",
            share(bound.seconds / job.seconds),
            bound_by(job),
        )
    return grid


def _phase_seconds(job: Job, phase: str) -> str:
    report = job.replay.phases.get(phase)
    return rate(report.seconds) if report is not None and report.seconds else NONE


def _two(percentiles: dict[int, float]) -> str:
    """Median and 99th percentile; none where nothing was counted, as between tokens of one-token answers."""
    return f"{time_text(percentiles[50])} / {time_text(percentiles[99])}" if percentiles else NONE


def latencies_table(replays: Sequence[Replay]) -> Grid:
    """Median and 99th percentile of each plan."""
    names = ("to the first token", "between tokens", "whole request")
    columns = [Column("plan", left=True), *(Column(f"{name}\n50 / 99 %") for name in names)]
    grid = Grid("Latencies, requests arriving as the workload says", columns)
    for replay in replays:
        latency = replay.job.replay.latency
        if latency is not None:
            kinds = (latency.ttft, latency.inter_token, latency.end_to_end)
            grid.add(in_lines(replay.name), *(_two(k) for k in kinds))
    return grid
