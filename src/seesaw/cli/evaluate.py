"""`seesaw eval`: the lm-evaluation-harness with the model `seesaw`."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from seesaw.cli.failures import FAILED, UNUSABLE, say, set_up_logging
from seesaw.core.errors import ConfigError, SeesawError

_MODEL = ("--model", "-M", "--config", "-C")
"""What already says which model is evaluated."""
_WITHOUT_MODEL = ("ls", "validate", "-h", "--help")


def evaluate(context: typer.Context) -> None:
    """Evaluate a model by tasks of the lm-evaluation-harness.

    All arguments are those of `lm_eval`, which has to be installed (seesaw-llm[eval]);
    the model is `seesaw` unless --model says otherwise.
    """
    set_up_logging(debug=False)
    if find_spec("lm_eval") is None:
        say("error: `seesaw eval` needs the lm-evaluation-harness; pip install 'seesaw-llm[eval]'")
        raise typer.Exit(UNUSABLE)
    from seesaw.integrations.lm_eval import main

    try:
        main(with_model(context.args))
    except SeesawError as error:  # what the harness raises is shown as it shows it
        say(f"error: {error}")
        raise typer.Exit(UNUSABLE if isinstance(error, ConfigError) else FAILED) from None


def with_model(arguments: list[str]) -> list[str]:
    """The harness's arguments, with `--model seesaw` if they name none."""
    named = any(argument.split("=")[0] in _MODEL for argument in arguments)
    if named or not arguments or arguments[0] in _WITHOUT_MODEL:
        return arguments
    place = 1 if arguments[0] == "run" else 0
    return [*arguments[:place], "--model", "seesaw", *arguments[place:]]
