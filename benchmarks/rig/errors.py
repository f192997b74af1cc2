"""The rig's one error."""

from __future__ import annotations


class RigError(Exception):
    """The rig cannot be set up as asked; the message is one sentence for the user."""
