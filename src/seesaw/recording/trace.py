"""`TraceWriter`: events as a Chrome trace, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The file is a JSON array of trace events that is written as they come. Readers tolerate that its end is missing, so a
trace of a job that was killed opens as well. Rows: phases and scheduler of the control process, each rank's
computation, each rank's copies; counters above.
"""

from __future__ import annotations

import gzip
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import msgspec

from seesaw.core.errors import ConfigError
from seesaw.core.events import CONTROL, COPIES, PHASES, SCHEDULER, Event

logger = logging.getLogger(__name__)

_PID = 1
_BUFFER = 1 << 18
"""Bytes kept back before they are written, and compressed."""
_SECONDS = 1.0
"""After which they are written although they are few."""


def check_trace(path: str | Path) -> None:
    """Raise `ConfigError` if no trace can be written to `path`. Changes nothing on disk."""
    target = Path(path)
    there = target.exists()
    try:
        with target.open("ab"):
            pass
        if not there:
            target.unlink()
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be written: {error.strerror}; choose another file") from None


class TraceWriter:
    """Writes a trace to one file, in bounded memory; gzipped if its name ends in `.gz`.

    A disk that fails ends the trace with a warning, and nothing else. All methods may be called from any thread.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises `ConfigError` if the file cannot be written."""
        self._path = Path(path)
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        self._zero = self._written = time.monotonic()
        self._rows: dict[tuple[int, str], int] = {}
        """Row number by rank and lane."""
        self._buffer = bytearray(b"[")
        try:
            self._file: IO[bytes] | None = _open(self._path)
        except OSError as error:
            raise ConfigError(f"trace {path}: cannot be written: {error.strerror}") from None
        self._name("process_name", "seesaw", 0)
        for lane in (PHASES, SCHEDULER):
            self._row(CONTROL, lane)

    def add(self, events: Iterable[Event]) -> None:
        """Write events."""
        with self._lock:
            for event in events:
                self._put(self._as_chrome(event))
            self._write_if_due()

    def counters(self, values: Mapping[str, float]) -> None:
        """Write what counters stand at now, each under its own name."""
        with self._lock:
            now = self._microseconds(time.monotonic())
            for name, value in values.items():
                self._put({"name": name, "ph": "C", "ts": now, "pid": _PID, "args": {"value": value}})
            self._write_if_due()

    def close(self) -> None:
        """End the array and close the file. May be called twice."""
        with self._lock:
            if self._file is not None:
                self._buffer += b"\n]\n"
                self._write()
            if self._file is not None:
                with suppress(OSError):  # what matters has been flushed
                    self._file.close()
                self._file = None

    def _as_chrome(self, event: Event) -> dict[str, object]:
        args: dict[str, object] = {}
        if event.tokens:
            args["tokens"] = event.tokens
        if event.bytes:
            args["bytes"] = event.bytes
            if event.seconds > 0:
                args["GB/s"] = round(event.bytes / event.seconds / 1e9, 3)
        return {
            "name": event.name,
            "cat": event.lane,
            "ph": "X",
            "ts": self._microseconds(event.start),
            "dur": round(event.seconds * 1e6, 3),
            "pid": _PID,
            "tid": self._row(event.rank, event.lane),
            "args": args | event.args,
        }

    def _microseconds(self, moment: float) -> float:
        return round((moment - self._zero) * 1e6, 3)

    def _row(self, rank: int, lane: str) -> int:
        """The row's number; a new row gets its name."""
        row = self._rows.get((rank, lane))
        if row is None:
            if rank == CONTROL:
                row, name = 1 + (lane != PHASES), lane
            else:
                row = 10 + 2 * rank + (lane == COPIES)
                name = f"rank {rank}" if lane != COPIES else f"rank {rank} copies"
            self._rows[rank, lane] = row
            self._name("thread_name", name, row)
            self._put(_meta("thread_sort_index", {"sort_index": row}, row))
        return row

    def _name(self, kind: str, name: str, row: int) -> None:
        self._put(_meta(kind, {"name": name}, row))

    def _put(self, entry: dict[str, object]) -> None:
        if self._file is not None:
            self._buffer += b"\n" if len(self._buffer) == 1 and self._buffer == b"[" else b",\n"
            self._buffer += self._encoder.encode(entry)

    def _write_if_due(self) -> None:
        if len(self._buffer) > _BUFFER or time.monotonic() - self._written > _SECONDS:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._file is None:
            return
        try:
            self._file.write(self._buffer)
            self._file.flush()
        except OSError as error:
            logger.warning("trace %s: ends here, it cannot be written: %s", self._path, error.strerror)
            self._file = None
        self._buffer.clear()


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "wb", compresslevel=5))
    return path.open("wb")


def _meta(kind: str, args: dict[str, object], row: int) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": _PID, "tid": row, "args": args}
