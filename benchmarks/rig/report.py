"""What a keeper says to whoever started it."""

from __future__ import annotations

import msgspec

NODE_NAME = "seesaw-node"
"""Name of the memory that holds a rig's node file; how `status` finds it."""


class Report(msgspec.Struct, frozen=True):
    """Said once: the rig is up, or why not."""

    node_file: str = ""
    command_group: str | None = None
    error: str | None = None
