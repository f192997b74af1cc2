"""The classes of commands: what typer's own lack."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _SwitchesWithoutType:
    """Shows switches as what they are; typer would add `<bool>`."""

    def get_params(self, ctx: Any) -> Any:
        """All parameters, `--help` among them."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Group(_SwitchesWithoutType, TyperGroup):
    """A group of commands."""


class Command(_SwitchesWithoutType, TyperCommand):
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
