"""The classes of commands: what typer's own lack."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _HelpWithoutType:
    """Shows `--help` as the switch that it is; typer would add `<bool>`."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option, or None."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Group(_HelpWithoutType, TyperGroup):
    """A group of commands."""


class Command(_HelpWithoutType, TyperCommand):
    """A command."""


class JsonCommand(Command):
    """A command whose `--json` may stand without a file, for standard output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--json` its `-`."""
        given = []
        for i, argument in enumerate(args):
            given.append(argument)
            following = args[i + 1] if i + 1 < len(args) else "--"
            if argument == "--json" and following.startswith("-") and following != "-":
                given.append("-")
        return super().parse_args(ctx, given)
