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
                _skip_line(file)
            yield number, None
        elif line.strip():
            yield number, line


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(_CHUNK)) and not piece.endswith(b"\n"):
        pass


class LineCounter:
    """Counts the lines of a regular file on a thread of its own, so that nothing waits for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="seesaw-count-lines", daemon=True)
        self._thread.start()

    @property
    def count(self) -> int | None:
        """Lines of the file, blank ones included; None until they are counted."""
        return self._count

    def close(self) -> None:
        """Give the counting up, if it has not ended."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                return
            with open(self._path, "rb", buffering=0) as file:
                self._count = self._count_lines(file)
        except OSError:
            return  # the reader of the rows meets the same error and reports it

    def _count_lines(self, file: BinaryIO) -> int | None:
        lines, last = 0, b"\n"
        while chunk := file.read(_CHUNK):
            if self._stop.is_set():
                return None
            lines += chunk.count(b"\n")
            last = chunk[-1:]
        return lines + (last != b"\n")
