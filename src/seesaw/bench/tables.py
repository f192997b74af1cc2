"""The tables of a bench, as text in cells: for the terminal and for a record alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seesaw.bench.probe import ProbeResult
from seesaw.bench.profiles import MANY, REST
from seesaw.bench.results import Entry, WorkloadResult, comparisons, median, ratio
from seesaw.core.units import format_bytes

NONE = "–"
INDENT = "\N{NO-BREAK SPACE}" * 4
_NOTEWORTHY = 0.05
"""Share of the cores from which on the work of others is told."""

ASSUMPTIONS = (
    "A floor counts matrix products and attention at the highest rate measured for one size, type and "
    "implementation, and reads of weights and KV at the bandwidth measured, both on all ranks at once; work is "
    "divided evenly, ranks never wait, nothing else takes time. Prefill and decode follow each other: a batch that "
    "mixes them (`mixed`) could overlap arithmetic with reading, and is compared with the sum. In prefill, KV is "
    "taken to stay in cache, and the LM head runs on the last token of each prompt. MFU is of the rate measured; "
    "GB/s are bytes that had to be read at least, over the time taken."
)


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows; the first column is aligned left, the others right."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def workload_tables(result: WorkloadResult, reference: Entry | None) -> list[Table]:
    """What happened on a workload: contestants; phases; transitions and functions where there are any."""
    tables = [_contestants(result, reference)]
    phases = _phases(result)
    if phases.rows:
        tables.append(phases)
    transitions = _transitions(result)
    if transitions.rows:
        tables.append(transitions)
    functions = _functions(result)
    if functions.rows:
        tables.append(functions)
    return tables


def reference_of(result: WorkloadResult, name: str | None) -> Entry | None:
    """The entry of this name; without a name the best of vLLM, or else the first that has runs."""
    if name is not None:
        return next((entry for entry in result.entries if entry.name == name), None)
    first = next((entry for entry in result.entries if entry.runs), None)
    return result.best("vllm") or first


def _contestants(result: WorkloadResult, reference: Entry | None) -> Table:
    over = f"× {reference.name}" if reference is not None else "ratio"
    columns = ["contestant", "start s", "runs", "median s", "tokens/s", "least to most", over, "of floor"]
    ordered = sorted(result.entries, key=lambda entry: -(entry.rate or 0.0))
    rows = [_contestant(entry, ratio(entry, reference)) for entry in ordered]
    notes = [
        f"{what}: {entry.name} over {other.name}, {value:.2f} ×"
        for what, entry, other, value in comparisons(result)
    ]
    notes += [f"{entry.name} failed: {entry.error}" for entry in ordered if entry.error is not None]
    others = median(run.others for entry in result.entries for run in entry.runs)
    if others is not None and others > _NOTEWORTHY:
        notes.append(
            f"other processes kept {others:.0%} of the machine's cores busy meanwhile (median): do not trust it"
        )
    workload = result.workload
    return Table(f"{workload.name}: {workload.describe()}", columns, rows, notes)


def _contestant(entry: Entry, over: float | None) -> list[str]:
    if entry.rate is None or entry.seconds is None:
        return [entry.name, _number(entry.start_seconds, 1), "0", *[NONE] * 3, NONE, NONE]
    share = NONE if entry.floor is None else f"{entry.floor.seconds / entry.seconds:.0%}"
    return [
        entry.name,
        _number(entry.start_seconds, 1),
        str(len(entry.runs)),
        _number(entry.seconds, 2),
        f"{entry.rate:,.0f}",
        f"{min(entry.rates):,.0f} to {max(entry.rates):,.0f}",
        _number(over, 2),
        share,
    ]


def _phases(result: WorkloadResult) -> Table:
    columns = [
        "contestant, phase",
        "seconds",
        "floor s",
        "of floor",
        "MFU",
        "GB/s",
        "steps",
        "ms a step",
        "control ms a step",
        "rank ms a step",
    ]
    rows = [
        _phase(entry, name, seconds)
        for entry in result.entries
        for name, seconds in entry.phases().items()
        if seconds > 0 and name not in ("transition", "idle")
    ]
    notes = []
    floors = [entry.floor for entry in result.entries if entry.floor is not None]
    if floors:
        floor = floors[0]
        notes.append(
            f"decode at the floor: {floor.decode_steps} steps of {floor.mean_batch:.1f} sequences on average "
            f"({next(entry.name for entry in result.entries if entry.floor is not None)})"
        )
    return Table(f"{result.workload.name}: phases, medians of one run", columns, rows, notes)


def _phase(entry: Entry, name: str, seconds: float) -> list[str]:
    floor, cells = entry.floor, [f"{entry.name}, {name}", _number(seconds, 2)]
    if floor is None:
        cells += [NONE] * 4
    else:
        work = floor.phase(name)
        cells += [
            _number(work.seconds, 2),
            f"{work.seconds / seconds:.0%}",
            f"{work.flops / seconds / floor.rates.flops:.0%}",
            f"{work.bytes / seconds / 1e9:.1f}",
        ]
    steps = entry.by_key("steps").get(name, 0)
    if not steps:
        return [*cells, *[NONE] * 4]
    control, ranks = entry.by_key("host_seconds").get(name), entry.by_key("rank_host_seconds").get(name)
    each = [None if value is None else value / steps * 1e3 for value in (seconds, control, ranks)]
    return [*cells, f"{steps:,.0f}", *[_number(value, 2) for value in each]]


def _transitions(result: WorkloadResult) -> Table:
    columns = ["contestant", "transitions", "mode", "moving s", "of the run", "moved", "GB/s", "× copying"]
    rows = []
    for entry in result.entries:
        count, seconds, moved = entry.transitions()
        if not count or entry.seconds is None:
            continue
        rate = f"{moved / seconds / 1e9:.1f}" if seconds and moved else NONE
        mode = entry.about.get("transition") or NONE
        share = f"{seconds / entry.seconds:.1%}"
        times = None if entry.copy_rate is None or not moved else seconds * entry.copy_rate / moved
        cells = [f"{count:.0f}", mode, _number(seconds, 3), share, format_bytes(moved), rate]
        rows.append([entry.name, *cells, _number(times, 2)])
    notes = ["× copying: over the time in which the ranks copy as much memory, as measured"] if rows else []
    return Table(f"{result.workload.name}: transitions, medians of one run", columns, rows, notes)


def _functions(result: WorkloadResult) -> Table:
    columns = ["contestant, phase, function", "ms a step", "share"]
    rows, notes = [], []
    for entry in result.entries:
        for phase, times in entry.profile.items():
            what = f"{entry.name}, {phase}"
            notes.append(f"{what}: a step of {times.tokens:,.0f} tokens, the mean of {times.forwards:,}")
            rows.append([what, _number(times.seconds * 1e3, 2), "100%"])
            small = 0.0
            for name, seconds in times.functions.items():
                if seconds < MANY * times.seconds and name != REST:
                    small += seconds
                    continue
                rows.append([f"{INDENT}{name}", *_part(seconds, times.seconds)])
            if small:
                rows.insert(len(rows) - 1, [f"{INDENT}others", *_part(small, times.seconds)])
    return Table(f"{result.workload.name}: functions, means over the ranks", columns, rows, notes)


def _part(seconds: float, whole: float) -> list[str]:
    return [_number(seconds * 1e3, 2), f"{seconds / whole:.1%}"]


def probe_table(probes: Sequence[ProbeResult]) -> Table:
    """What the machine can do, by number of ranks."""
    columns = [
        "ranks",
        "products",
        "GFLOP/s together",
        "one alone",
        "read GB/s",
        "alone",
        "copy GB/s",
        "alone",
    ]
    rows = []
    for probe in probes:
        memory = [probe.read, probe.read_alone, probe.copy, probe.copy_alone]
        for i, name in enumerate(sorted(probe.products, key=lambda name: -probe.products[name])):
            rates = [f"{probe.products[name] / 1e9:,.0f}", f"{probe.product_alone[name] / 1e9:,.0f}"]
            last = [f"{value / 1e9:.1f}" for value in memory] if i == 0 else [""] * 4
            rows.append([str(probe.ranks) if i == 0 else "", name, *rates, *last])
    return Table(
        "what the ranks' cores can do, best of the model's sizes, measured in this bench", columns, rows
    )


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"
