"""A ranking of plans as people read it on a terminal: the answer, the table, where the time goes, how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.report.causes import Job, bound_by, difference, limits, time_text
from seesaw.report.replays import memory_text
from seesaw.report.text import (
    NONE,
    Column,
    Grid,
    breakdown,
    count,
    gib,
    heading,
    line,
    plain,
    rate,
    share,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from seesaw.planning.candidates import Candidate, Ranking

ESTIMATED = "~"
"""Stands before figures that no replay has confirmed."""
_NAMED = 4
"""Plans left out that are named."""


def show_ranking(
    ranking: Ranking, console: Console, *, profile: Path | None, command: str, notes: Sequence[str], top: int
) -> None:
    """Print all of it. `command` runs the best plan, `top` is the number of rows of the table."""
    for piece in heading(ranking.model, ranking.hardware, ranking.workload, profile):
        console.print(piece)
    console.print()
    console.print(plain(answer(ranking), style="bold"))
    console.print()
    console.print(plans_table(ranking, top))
    console.print(plain(legend(ranking), style="dim"))
    if ranking.refused:
        console.print(plain(refusals(ranking), style="dim"))
    console.print()
    console.print(breakdown(compared(ranking)))
    for piece in explanation(ranking):
        console.print(piece)
    console.print()
    console.print(line("run it", folded(command, console.width - 16)))
    for note in (*ranking.notes, *notes):
        console.print(line("note", note))


def answer(ranking: Ranking) -> str:
    """What to run, what it gives, against what, and what bounds it, in one sentence."""
    best, static = ranking.best, ranking.best_static
    text = f"Run {best.name}: {rate(best.rate)} tokens/s (prompts and outputs), {_time(best)} for the job; "
    if static is None:
        text += "no static plan fits; "
    elif static is best:
        text += f"it is a static plan, {_over_separate(ranking)}; "
    else:
        text += f"{best.rate / static.rate:.2f}× the best static plan ({static.name}: {rate(static.rate)} tokens/s); "
    return f"{text}bound by {bound_by(job_of(best))}."


def _over_separate(ranking: Ranking) -> str:
    other = next((one for one in ranking.replayed if one.plan.separate), None)
    if other is None:
        return "and no plan with separate phases came near it"
    return (
        f"{ranking.best.rate / other.rate:.2f}× the best plan with separate phases "
        f"({other.name}: {rate(other.rate)} tokens/s)"
    )


def _time(candidate: Candidate) -> str:
    return time_text(candidate.seconds)


def job_of(candidate: Candidate) -> Job:
    """A replayed candidate, told for the whole job."""
    assert candidate.simulated is not None, f"{candidate.name} was not replayed"
    return Job(candidate.name, candidate.simulated, candidate.scale)


# ---- the table --------------------------------------------------------------------------------------------

_COLUMNS = (
    Column("plan", left=True),
    Column("tokens/s"),
    Column("rows/s", spare=5),
    Column("× best\nstatic"),
    Column("weights\nGiB", spare=1),
    Column("KV pool\nGiB", spare=3),
    Column("chunk\ntokens", spare=4),
    Column("decoding\nat once", spare=2),
    Column("transi-\ntions"),
    Column("of\nbound"),
)


def plans_table(ranking: Ranking, top: int) -> Grid:
    """The best `top` plans, replayed ones first; the best static plan always among them."""
    grid = Grid("Plans, best first", _COLUMNS)
    shown = shown_candidates(ranking, top)
    for place, candidate in enumerate(shown):
        left_out = candidate is ranking.best_static and place == len(shown) - 1 and len(shown) > top
        style = "bold" if candidate is ranking.best else "dim" if candidate.simulated is None else ""
        grid.add(*row(ranking, candidate), style=style, rule=left_out)
    return grid


def shown_candidates(ranking: Ranking, top: int) -> list[Candidate]:
    """Those of the table, in its order."""
    shown = [*ranking.replayed, *ranking.others][:top]
    static = ranking.best_static
    if static is not None and all(one is not static for one in shown):
        shown.append(static)
    return shown


def row(ranking: Ranking, candidate: Candidate) -> list[str]:
    """The cells of a candidate."""
    static, setup, replay = ranking.best_static, candidate.setup, candidate.simulated
    about = ESTIMATED if replay is None else ""
    transitions = candidate.estimate.transitions if replay is None else replay.transitions
    return [
        candidate.name + (" (best static)" if candidate is static else ""),
        about + rate(candidate.rate),
        about + rate(candidate.rows_per_second),
        about + (NONE if static is None else f"{candidate.rate / static.rate:.2f}"),
        NONE if setup is None else gib(max(setup.memory.weights)),
        NONE if setup is None else gib(max(setup.memory.pool)),
        f"{chunk(candidate):,}" if chunk(candidate) else NONE,
        f"{candidate.estimate.batch:,.0f}",
        f"{about}{transitions:,}" if candidate.plan.separate else NONE,
        about + share(ranking.bound.seconds / candidate.seconds),
    ]


def kind(ranking: Ranking, candidate: Candidate) -> str:
    """`re-shards`, `two phases` (under one layout), `static`, `best static`."""
    if candidate is ranking.best_static:
        return "best static"
    if not candidate.plan.separate:
        return "static"
    return "re-shards" if candidate.plan.reshards else "two phases"


def chunk(candidate: Candidate) -> int | None:
    """Most tokens of a batch that holds prefill, as worked out."""
    return candidate.limits.chunk if candidate.setup is None else candidate.setup.scheduler.max_batch_tokens


def legend(ranking: Ranking) -> str:
    """What the columns are, and how the figures came about."""
    return (
        "tokens/s: prompts and outputs together. weights: the most that a rank holds, transitions included; KV pool: "
        "a rank's room for KV. chunk: most tokens of a batch that holds prefill. decoding at once: sequences, all "
        "replicas together. of bound: the least time that the node's arithmetic and memory allow, "
        f"{time_text(ranking.bound.seconds)}, over the plan's. {_effort(ranking)}"
    )


def _effort(ranking: Ranking) -> str:
    replays = [one.simulated for one in ranking.replayed if one.simulated is not None]
    text = (
        f"{count(ranking.considered, 'combination')} of plan, chunk and batch considered, "
        f"{count(len(replays), 'plan')} replayed request by request"
    )
    fewest = min(done.requests for done in replays)
    if fewest < ranking.workload.requests:
        text += f" ({fewest:,} of the {ranking.workload.requests:,} requests, evenly picked)"
    if ranking.others:
        text += f"; {ESTIMATED} estimated in closed form only"
    return text + "."


def refusals(ranking: Ranking) -> str:
    """How many plans cannot be run, and which, in a line."""
    names = list(dict(ranking.refused))
    some = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
    return f"{count(len(names), 'plan')} left out for want of memory: {some} (--json has the reasons)."


def folded(command: str, width: int = 84) -> str:
    """A command on as many lines as it needs, broken before options."""
    lines = [""]
    for piece in command.split(" --"):
        text = piece if not lines[-1] else f"--{piece}"
        if lines[-1] and len(lines[-1]) + 1 + len(text) > width:
            lines[-1] += " \\"
            lines.append(f"  {text}")
        else:
            lines[-1] = f"{lines[-1]} {text}".lstrip(" ") if len(lines) == 1 else f"{lines[-1]} {text}"
    return "\n".join(lines)


# ---- why --------------------------------------------------------------------------------------------------


def compared(ranking: Ranking) -> list[Job]:
    """The winner, and the best static plan if that is another."""
    static = ranking.best_static
    others = [static] if static is not None and static is not ranking.best else []
    return [job_of(candidate) for candidate in (ranking.best, *others)]


def explanation(ranking: Ranking) -> list[RenderableType]:
    """What limits the winner, where it gains on the best static plan, and the bound."""
    winner, *others = compared(ranking)
    gains = [difference(winner, other) for other in others]
    setup = ranking.best.setup
    assert setup is not None, "the best plan was replayed"
    return [
        line("memory", memory_text(setup.memory)),
        line("limits", limits(winner)),
        *(line("gain", gain) for gain in gains if gain),
        line("bound", bound_text(ranking)),
    ]


def bound_text(ranking: Ranking) -> str:
    """The least time any plan can take, and what share of that speed the best one reaches."""
    bound, best = ranking.bound, ranking.best
    return (
        f"no plan on this node takes less than {time_text(bound.seconds)} "
        f"(prefill {time_text(bound.prefill_seconds)}, decode {time_text(bound.decode_seconds)}): the arithmetic and "
        "bytes that are necessary, evenly divided, with no communication and no overheads. "
        f"{best.name} takes {_time(best)} and so reaches {share(bound.seconds / best.seconds)} of it."
    )
