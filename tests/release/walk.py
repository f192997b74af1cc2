"""One piece of bash of all the commands of a page."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

from tests.release.markdown import Block, blocks
from tests.release.stand_ins import runnable


def walked(page: Path) -> list[Block]:
    """Blocks that run anywhere: commands, and programs in Python that are whole."""
    found = [block for block in blocks(page) if block.needs is None]
    return [block for block in found if block.language == "sh" or _is_program(block)]


def script(page: Path) -> str:
    """The commands of a page, in order, in one shell, with the place of each block printed before it."""
    parts: list[str] = []
    port = _free_port()
    for block in walked(page):
        text = runnable(block.text, port)
        if block.language == "python":
            text = f"python - <<'PROGRAM'\n{text}PROGRAM\n"
        parts.append(f"echo {shlex.quote(f'## {block}')}\n{text}")
    return "\n".join(parts)


def _is_program(block: Block) -> bool:
    return block.language == "python" and "from seesaw import" in block.text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
