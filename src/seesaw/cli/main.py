"""The `seesaw` command."""

from __future__ import annotations

from typing import Annotated

import typer

from seesaw import __version__
from seesaw.cli.bench import bench
from seesaw.cli.commands import Command, Group, JsonCommand
from seesaw.cli.devices import devices
from seesaw.cli.evaluate import evaluate
from seesaw.cli.plan import plan
from seesaw.cli.profile import profile
from seesaw.cli.report import report
from seesaw.cli.run import run
from seesaw.cli.simulate import simulate

app = typer.Typer(
    name="seesaw",
    cls=Group,
    help="Offline, batch LLM inference that re-shards the model between prefill and decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", cls=Command)(run)
app.command("report", cls=Command)(report)
app.command("plan", cls=JsonCommand)(plan)
app.command("simulate", cls=JsonCommand)(simulate)
app.command(
    "eval",
    add_help_option=False,  # the harness has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(evaluate)
app.command("devices", cls=Command)(devices)
app.command("profile", cls=Command)(profile)
app.command("bench", cls=Command)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seesaw {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Offline, batch LLM inference that re-shards the model between prefill and decode."""


def main() -> None:
    """Entry point of the console command and of `python -m seesaw`."""
    app(prog_name="seesaw")
