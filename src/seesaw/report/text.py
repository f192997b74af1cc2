"""Tables and lines of the planner's reports on a terminal. rich is imported where something is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.core.hardware import HardwareSpec
from seesaw.core.units import format_bytes
from seesaw.report.causes import CAUSES, PHASES, Job

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from seesaw.planning.shapes import PlannedModel
    from seesaw.planning.workloads import Workload

WIDTH = 100
"""Columns where there is no terminal."""
NONE = "–"
_LABEL = 9
_LEAST_WRAPPED = 16


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    header: str
    left: bool = False
    style: str = ""
    wraps: bool = False
    """Whether it gives way where the table is too wide."""
    spare: int = 0
    """Not 0 where a narrow terminal can go without it; the largest is left out first."""


@dataclass(slots=True)
class Grid:
    """A table of text that leaves out what a narrow console has no room for. Cells may have several lines."""

    title: str
    columns: Sequence[Column]
    rows: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    """Cells and style of each."""
    rules: set[int] = field(default_factory=set)
    """Numbers of rows that a gap precedes."""

    def add(self, *cells: str, style: str = "", rule: bool = False) -> None:
        """A row; with `rule`, apart from those above it."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        if rule:
            self.rules.add(len(self.rows))
        self.rows.append((cells, style))

    def column(self, number: int) -> list[str]:
        """The cells below a header."""
        return [cells[number] for cells, _ in self.rows]

    def shown(self, width: int) -> list[int]:
        """Numbers of the columns that `width` columns of a terminal have room for."""
        kept = list(range(len(self.columns)))
        spare = sorted((i for i in kept if self.columns[i].spare), key=lambda i: -self.columns[i].spare)
        while spare and sum(self._width(i) + 2 for i in kept) > width:
            kept.remove(spare.pop(0))
        return kept

    def _width(self, number: int) -> int:
        if self.columns[number].wraps:
            return _LEAST_WRAPPED
        cells = [self.columns[number].header, *self.column(number)]
        return max(len(text) for cell in cells for text in cell.split("\n"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich calls to draw it."""
        from rich import box
        from rich.table import Table

        shown = self.shown(options.max_width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        height = max(self.columns[i].header.count("\n") for i in shown)
        for column in (self.columns[i] for i in shown):
            table.add_column(
                plain("\n" * (height - column.header.count("\n")) + column.header),
                justify="left" if column.left else "right",
                style=column.style,
                no_wrap=not column.wraps,
                min_width=_LEAST_WRAPPED if column.wraps else None,
            )
        for number, (cells, style) in enumerate(self.rows):
            if number in self.rules:
                table.add_section()
            table.add_row(*(plain(cells[i]) for i in shown), style=style)
        yield plain(self.title, style="bold")
        yield table
        yield plain("")


def console() -> Console:
    """Standard output, at least 100 columns wide where it is no terminal."""
    from rich.console import Console

    out = Console(highlight=False)
    if out.is_terminal or out.width >= WIDTH:
        return out
    return Console(highlight=False, width=WIDTH)


def line(label: str, text: str) -> RenderableType:
    """A label and its text, which is indented where it needs several lines."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=_LABEL, style="bold")
    grid.add_column(overflow="fold")
    grid.add_row(label, plain(text))
    return grid


def plain(text: str, style: str = "") -> RenderableType:
    """Text in which nothing is markup."""
    from rich.text import Text

    return Text(text, style=style)


def heading(
    model: PlannedModel, hardware: HardwareSpec, workload: Workload, profile: Path | None
) -> list[RenderableType]:
    """A line each on model, node and workload."""
    return [
        line("model", model.describe()),
        line("node", describe_node(hardware, profile)),
        line("workload", workload.describe()),
    ]


def in_lines(name: str) -> str:
    """A plan's name, its settings below it."""
    return name.replace("@", "\n@").replace(":", "\n:").replace(",", ",\n")


def describe_node(hardware: HardwareSpec, profile: Path | None) -> str:
    """Its ranks and where its figures come from."""
    what = f"{hardware.ranks} × {hardware.name}, {format_bytes(hardware.memory)} of memory each; "
    if profile is None:
        return what + "figures from the catalogue, not measured on this box"
    return what + f"measured: {profile}"


# ---- numbers ----------------------------------------------------------------------------------------------


def rate(value: float) -> str:
    """Three significant digits, or a whole number: `0.0123`, `3.60`, `1,129`."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value else "0"


def gib(size: float) -> str:
    """Bytes in GiB, for a column that says so."""
    value = size / (1 << 30)
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def share(value: float) -> str:
    """Of a whole, in per cent."""
    return f"{value:.0%}"


def count(number: int, what: str) -> str:
    """`1 transition`, `2 transitions`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# ---- where the time goes ----------------------------------------------------------------------------------


def breakdown(jobs: Sequence[Job], *, by_phase: bool = True) -> Grid:
    """Per cent of each job's time by cause; with `by_phase`, in each phase of the first job as well."""
    first = jobs[0]
    phases = [phase for phase, report in first.replay.phases.items() if report.seconds] if by_phase else []
    if len(phases) < 2:
        phases = []
    columns = [Column("", left=True)]
    columns += [
        Column(f"{'' if i else in_lines(first.name)}\n{PHASES[phase]}") for i, phase in enumerate(phases)
    ]
    if phases:
        columns += [Column(f"{'' if job is first else in_lines(job.name)}\nin all") for job in jobs]
    else:
        columns += [Column(in_lines(job.name)) for job in jobs]
    columns.append(Column("what it is", left=True, style="dim", wraps=True, spare=1))
    grid = Grid("Where the time goes, in per cent of the job's time", columns)
    for cause, words in CAUSES.items():
        shares = [first.share(_seconds(first, phase, cause)) for phase in phases]
        shares += [job.share(sum(_seconds(job, phase, cause) for phase in job.replay.phases)) for job in jobs]
        if any(round(value, 4) for value in shares):
            grid.add(words.name, *(_percent(value) for value in shares), words.meaning)
    times = [first.replay.phases[phase].seconds * first.scale for phase in phases]
    seconds = (rate(seconds) for seconds in (*times, *(job.seconds for job in jobs)))
    grid.add("seconds", *seconds, "", rule=True)
    return grid


def _seconds(job: Job, phase: str, cause: str) -> float:
    return job.replay.phases[phase].causes[cause]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if round(value, 4) else NONE
