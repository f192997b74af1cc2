"""The `seesaw` command."""

from __future__ import annotations

from typing import Annotated

import typer

from seesaw import __version__
from seesaw.cli.bench import bench
from seesaw.cli.devices import devices
from seesaw.cli.plan import plan
from seesaw.cli.plan_options import JsonCommand
from seesaw.cli.profile import profile
from seesaw.cli.report import report
from seesaw.cli.run import run
from seesaw.cli.simulate import simulate

app = typer.Typer(
    name="seesaw",
    help="Offline, batch LLM inference that re-shards the model between prefill and decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run)
app.command("report")(report)
app.command("plan", cls=JsonCommand)(plan)
app.command("simulate", cls=JsonCommand)(simulate)
app.command("devices")(devices)
app.command("profile")(profile)
app.command("bench")(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seesaw {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True, metavar=""
        ),
    ] = False,
) -> None:
    """Offline, batch LLM inference that re-shards the model between prefill and decode."""


def main() -> None:
    """Entry point of the console command and of `python -m seesaw`."""
    app(prog_name="seesaw")
