"""`seesaw simulate`: given plans, replayed request by request on a virtual clock."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from seesaw.cli import plan_options as opt
from seesaw.cli.failures import FAILED, reported, say, set_up_logging
from seesaw.cli.plan import STANDARD_OUTPUT, waiting
from seesaw.cli.subject import Subject, resolve, size, write
from seesaw.core.errors import ConfigError, LayoutError, MemoryBudgetError
from seesaw.core.layout import Plan

if TYPE_CHECKING:
    from seesaw.planning.bound import Bound
    from seesaw.report.replays import Replay

_BETWEEN_PLANS = re.compile(r"\s+|,(?=[DPT][1-9])", re.IGNORECASE)
"""A comma before anything but a layout belongs to the settings of a plan."""
_PLAN = re.compile(r"([^:@]*)(?::([^@]*))?(?:@(.*))?")
_SETTINGS = ("chunk", "max_running", "transition", "policy", "device_memory", "host_kv")


def simulate(
    model: opt.Model,
    plans: opt.Plans = None,
    hardware: opt.Hardware = None,
    workload: opt.Workload = None,
    requests: opt.Requests = None,
    weights: opt.Weights = None,
    kv: opt.KV = None,
    seed: opt.Seed = 0,
    arrivals: opt.Arrivals = True,
    plan: opt.PlanText = None,
    compare: opt.Compare = None,
    device_memory: opt.DeviceMemory = None,
    host_kv: opt.HostKV = None,
    max_running: opt.MaxRunning = None,
    chunk: opt.Chunk = None,
    policy: opt.Policy = None,
    transition: opt.Transition = "auto",
    max_model_len: opt.MaxModelLen = None,
    json: opt.Json = None,
    debug: opt.Debug = False,
) -> None:
    """Replay plans request by request: the engine's own scheduler on a virtual clock.

    One plan is reported in full, several side by side, ratios over the first.
    A plan may carry settings: 'P8->T4P2:prefill-first', 'T4@chunk=512'.

    Exit code: 0 if every plan could be replayed, 1 if some could not,
    2 if none could, or for unusable arguments.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        subject = resolve(
            model=model,
            hardware=hardware,
            workload=workload,
            requests=requests,
            weights=weights,
            kv=kv,
            seed=seed,
            arrivals=arrivals,
            device_memory=device_memory,
            host_kv=host_kv,
            max_model_len=max_model_len,
        )
        subject = _as_listed(subject)
        asked = {
            "device_memory": subject.device_memory,
            "host_kv": subject.host_kv,
            "max_running": max_running,
            "chunk": chunk,
            "policy": policy,
            "transition": None if transition == "auto" else transition,
            "max_model_len": max_model_len or subject.workload.longest,
        }
        wanted = parse_plans([*([plan] if plan else []), *(compare or []), *(plans or [])], asked)
        with waiting("replaying"):
            replays = [replayed(subject, name, settings) for name, settings in wanted]
        if all(one.error is not None for one in replays):
            raise ConfigError("; ".join(f"{one.name}: {one.error}" for one in replays))
        _report(replays, subject, json)
    if any(one.error is not None for one in replays):
        raise typer.Exit(FAILED)


def _as_listed(subject: Subject) -> Subject:
    """Only the requests whose lengths are known are replayed, for a job file too large to keep."""
    job = subject.workload
    if job.requests == len(job):
        return subject
    note = f"an even sample of {len(job):,} of the {job.requests:,} requests is replayed"
    return replace(subject, workload=replace(job, represented=None), notes=(*subject.notes, note))


def parse_plans(texts: Sequence[str], asked: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The plans named, in order, each with its settings: those of `asked` and its own over them.

    Plans stand in one text with spaces or commas between, or in several. Raises `ConfigError`.
    """
    words = [word for text in texts for word in _BETWEEN_PLANS.split(text.strip()) if word]
    if not words:
        raise ConfigError(
            "no plan given: name one with --plan, such as --plan 'P8->T4P2', or several with --compare"
        )
    return [(word, asked | _own_settings(word)) for word in dict.fromkeys(words)]


def _own_settings(word: str) -> dict[str, Any]:
    """What stands behind a plan's layouts."""
    match = _PLAN.fullmatch(word)
    assert match is not None, word
    if match[1].endswith("-"):
        raise ConfigError(
            f"plan {word!r}: quote it, as in 'P8->T4P2'; a shell takes > for a file to write to"
        )
    own: dict[str, Any] = {"plan": Plan.parse(match[1])}
    if match[2] is not None:
        own["policy"] = match[2]
    for setting in match[3].split(",") if match[3] else []:
        name, _, value = setting.partition("=")
        key = name.strip().replace("-", "_")
        if key not in _SETTINGS or not value:
            raise ConfigError(
                f"plan {word!r}: {setting!r} is no setting; write NAME=VALUE with {', '.join(_SETTINGS)}"
            )
        own[key] = _value(word, key, value.strip())
    return own


def _value(word: str, key: str, value: str) -> int | str | None:
    from seesaw.planning.memory import TransitionMode

    if key in ("device_memory", "host_kv"):
        return size(f"plan {word!r}: {key}", value)
    if key in ("chunk", "max_running"):
        if not value.isdecimal() or not int(value):
            raise ConfigError(f"plan {word!r}: {key}={value} must be a whole number of at least 1")
        return int(value)
    if key == "transition" and value not in get_args(TransitionMode):
        raise ConfigError(
            f"plan {word!r}: transition {value!r}: choose one of {', '.join(get_args(TransitionMode))}"
        )
    return value


def replayed(subject: Subject, name: str, settings: dict[str, Any]) -> Replay:
    """A plan replayed, or the reason why it does not fit."""
    from seesaw.planning import twin
    from seesaw.planning.device_costs import costs_of
    from seesaw.planning.search import turn_costs
    from seesaw.planning.setup import Limits, set_up
    from seesaw.report.replays import Replay
    from seesaw.weights.sharding import check_layout

    given = {key: value for key, value in settings.items() if value is not None}
    plan, node = given.pop("plan"), subject.hardware
    if plan.world != node.ranks:
        raise LayoutError(
            f"plan {plan} is for {plan.world} ranks, but the node ({node.ranks} × {node.name}) has {node.ranks}"
        )
    limits = Limits(**given, costs=costs_of(node.device))
    try:
        for layout in (plan.prefill, plan.decode):
            check_layout(subject.model.spec, layout)
            if layout.tp > 1 and layout.tp not in node.all_reduce:
                known = ", ".join(str(ranks) for ranks in sorted(node.all_reduce)) or "none"
                raise LayoutError(
                    f"no all-reduce of {layout.tp} ranks is known of {node.name}, only of {known}"
                )
        setup = set_up(subject.model, plan, subject.dtype, limits)
    except (LayoutError, MemoryBudgetError) as error:
        return Replay(name=name, limits=limits, error=str(error))
    if plan.separate:  # as the planner does, so that a plan gives what was predicted of it
        limits = replace(limits, turn_costs=turn_costs(setup, node, subject.workload))
        setup = set_up(subject.model, plan, subject.dtype, limits)
    done = twin.simulate(setup, node, subject.workload)
    return Replay(name=name, limits=limits, setup=setup, simulated=done)


def _report(replays: Sequence[Replay], subject: Subject, json: str | None) -> None:
    from seesaw.planning.bound import bound

    least = bound(subject.model, subject.hardware, subject.workload, subject.dtype, max_resident_tokens=None)
    if json is not None:
        from seesaw.report.planned_json import encoded, simulation_entry

        text = encoded(
            simulation_entry(
                subject.model,
                subject.hardware,
                subject.workload,
                replays,
                dtype=subject.dtype,
                bound=least,
                profile=subject.profile,
                notes=subject.notes,
            )
        )
        if json == STANDARD_OUTPUT:
            typer.echo(text, nl=False)
            return
        write(Path(json), text, "--json")
        say(f"json: {json}")
    _show(replays, subject, least)


def _show(replays: Sequence[Replay], subject: Subject, least: Bound) -> None:
    from seesaw.report.replays import show_comparison, show_replay
    from seesaw.report.text import console, heading, line

    out = console()
    for piece in heading(subject.model, subject.hardware, subject.workload, subject.profile):
        out.print(piece)
    out.print()
    if len(replays) == 1:
        show_replay(replays[0], least, out)
    else:
        show_comparison(replays, least, out)
    for note in subject.notes:
        out.print(line("note", note))
