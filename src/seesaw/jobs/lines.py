"""Lines of a file as bytes, one at a time, with a bound on their length."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read, without its end."""
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_lines(file: BinaryIO, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """Line numbers from 1 and lines without their end (LF or CRLF) and without a byte-order mark.

    A line of more than `max_bytes` comes as None, and never stands in memory as a whole. Blank lines are
    counted and left out.
    """
    number = 0
    while line := file.readline(max_bytes + len(_BOM) + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        ended = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > max_bytes:
            if not ended:
                skip_line(file)
            yield number, None
        elif line.strip():
            yield number, line


def skip_line(file: BinaryIO) -> None:
    """Read to the end of the present line, in constant memory."""
    while (piece := file.readline(_CHUNK)) and not piece.endswith(b"\n"):
        pass


def count_lines(path: Path, stop: threading.Event) -> int | None:
    """Lines of a regular file, blank ones included; None for any other, or once `stop` is set.

    Raises `OSError`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return None
    lines, last = 0, b"\n"
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            if stop.is_set():
                return None
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")
