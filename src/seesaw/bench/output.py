"""A bench's result on the terminal, as JSON, and as a record that can be read and repeated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seesaw.bench.floor import Floor
from seesaw.bench.results import Entry, WorkloadResult, comparisons, ratio
from seesaw.bench.runner import BenchResult
from seesaw.bench.tables import ASSUMPTIONS, Table, probe_table, reference_of, workload_tables

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a result is to be read with."""

    shape: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    day: date
    reference: str | None = None
    note: str | None = None


def all_tables(found: BenchResult, reference: str | None) -> list[Table]:
    """Every table of a result, in order."""
    tables = [
        table
        for result in found.results
        for table in workload_tables(result, reference_of(result, reference))
    ]
    if found.probes:
        tables.append(probe_table(list(found.probes.values())))
    return tables


def show(found: BenchResult, reference: str | None, console: Console) -> None:
    """Print the tables."""
    from rich.table import Table as Grid

    for table in all_tables(found, reference):
        grid = Grid(title=table.title, title_justify="left", title_style="bold")
        for i, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)
        console.print()
    if found.probes:
        console.print(ASSUMPTIONS.replace("`", ""), markup=False, highlight=False)


def as_json(found: BenchResult, context: Context) -> dict[str, Any]:
    """Everything, with every single run."""
    return {
        "shape": context.shape,
        "command": context.command,
        "date": context.day.isoformat(),
        "note": context.note,
        "machine": dict(context.machine),
        "versions": dict(context.versions),
        "options": _portable(dataclasses.asdict(found.options)),
        "interrupted": found.interrupted,
        "probes": {str(ranks): dataclasses.asdict(probe) for ranks, probe in found.probes.items()},
        "workloads": [_workload(result, context.reference) for result in found.results],
    }


def _workload(result: WorkloadResult, reference: str | None) -> dict[str, Any]:
    over = reference_of(result, reference)
    return {
        "name": result.workload.name,
        "lengths": [list(pair) for pair in result.workload.lengths],
        "reference": None if over is None else over.name,
        "contestants": [_entry(entry, over) for entry in result.entries],
        "comparisons": [
            {"what": what, "contestant": entry.name, "over": other.name, "ratio": value}
            for what, entry, other, value in comparisons(result)
        ],
    }


def _entry(entry: Entry, reference: Entry | None) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.contestant.kind,
        "options": _portable(entry.contestant.options),
        "about": entry.about,
        "error": entry.error,
        "start_seconds": entry.start_seconds,
        "median_seconds": entry.seconds,
        "median_tokens_per_second": entry.rate,
        "ratio": ratio(entry, reference),
        "profile": {name: dataclasses.asdict(times) for name, times in entry.profile.items()},
        "floor": None if entry.floor is None else _floor(entry.floor),
        "runs": [{**dataclasses.asdict(run), "tokens_per_second": run.rate} for run in entry.runs],
    }


def _portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options but those that name files of this run."""
    return {name: value for name, value in options.items() if name not in ("node", "profile")}


def _floor(floor: Floor) -> dict[str, Any]:
    return {**dataclasses.asdict(floor), "seconds": floor.seconds}


def write_json(path: Path, found: BenchResult, context: Context) -> None:
    """Write `as_json` to a file."""
    path.write_text(json.dumps(as_json(found, context), indent=1) + "\n")


def write_record(folder: Path, name: str, found: BenchResult, context: Context) -> Path:
    """Write `<date>-<name>.md` and `.json` into `folder`, over those of the same name; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{context.day.isoformat()}-{name}.md"
    path.write_text(markdown(name, found, context))
    write_json(path.with_suffix(".json"), found, context)
    return path


def markdown(name: str, found: BenchResult, context: Context) -> str:
    """The record for people."""
    rounds = f"{found.options.rounds} rounds in alternation, the others' processes stopped"
    parts = [f"# {name}: {context.shape}, {context.day.isoformat()}"]
    if context.note:
        parts.append(context.note)
    if found.interrupted:
        parts.append("**Interrupted: not all rounds were run.**")
    facts = {**context.machine, **context.versions, **_others(found)}
    parts += [
        f"Repeat with\n\n    {context.command}\n",
        f"Weights are random; {rounds}. The clock runs from handing over all requests, as token ids, to the last "
        "answer; no text is made. Every answer has exactly the tokens asked for (greedy, end-of-sequence ignored, no "
        "prefix caching). tokens/s count prompt and output tokens; ratios are of medians.",
        "\n".join(_lines(["", ""], [[f"{key}", value] for key, value in facts.items()])),
    ]
    for table in all_tables(found, context.reference):
        parts += [f"## {table.title}", "\n".join(_lines(table.columns, table.rows))]
        if table.notes:
            parts.append("\n".join(f"- {_escaped(note)}" for note in table.notes))
    if found.probes:
        parts += ["## What the floors assume", ASSUMPTIONS]
    return "\n\n".join(parts) + "\n"


def _others(found: BenchResult) -> dict[str, str]:
    """Versions of the engines of others."""
    abouts = [entry.about for result in found.results for entry in result.entries]
    return (
        {"vllm": next(str(a["vllm"]) for a in abouts if "vllm" in a)}
        if any("vllm" in a for a in abouts)
        else {}
    )


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)] if columns[0] else ["---"] * len(columns)
    return [f"| {' | '.join(map(_escaped, cells))} |" for cells in (columns, rule, *rows)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
