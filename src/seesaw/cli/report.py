"""`seesaw report`: the page of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from seesaw.cli.failures import reported, set_up_logging
from seesaw.cli.run_options import Debug
from seesaw.core.errors import ConfigError

logger = logging.getLogger(__name__)


def report(
    directory: Annotated[
        Path, typer.Argument(help="Folder of the run's record, OUTPUT.run.", metavar="RUN_DIR")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write; by default RUN_DIR/report.html.", metavar="FILE"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw what `seesaw run` recorded: one HTML page that needs nothing else.

    Its path is the last line of the output. Exit code: 0, or 2 if there is no record or the page cannot be written.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        from seesaw.recording.prediction import predict
        from seesaw.recording.record import load_record
        from seesaw.report.run_page import page

        record = load_record(directory)
        if not record.runs:
            raise ConfigError(f"{directory}: the record has no run in it")
        text = page(record, predict(record.runs[-1]))
        target = output or directory / "report.html"
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
    typer.echo(f"report: {target}")
