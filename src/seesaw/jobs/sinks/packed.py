"""`PackedFile`: a file of bytes, compressed if asked, durable once closed; and `JsonlSink` over it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import IO, Any, cast

from seesaw.jobs.sinks.base import Sink

_GZIP_LEVEL = 6
_BUFFER = 1 << 20


class PackedFile:
    """Bytes go in, plain or compressed with `gzip` or `zstd`. The same bytes make the same file."""

    def __init__(self, path: Path, compression: str | None) -> None:
        self._file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115
        self._packer: IO[bytes] | None = None
        if compression == "gzip":
            # Neither name nor time of its making: they differ from run to run.
            packer: Any = gzip.GzipFile("", "wb", _GZIP_LEVEL, self._file, mtime=0)
            self._packer = cast("IO[bytes]", packer)
        elif compression == "zstd":
            import zstandard

            packer = zstandard.ZstdCompressor(write_checksum=True).stream_writer(self._file, closefd=False)
            self._packer = cast("IO[bytes]", packer)

    def write(self, data: bytes) -> None:
        """Raises `OSError`."""
        (self._packer or self._file).write(data)

    def close(self) -> None:
        """Make the file whole and durable. May be called twice. Raises `OSError`."""
        if self._file.closed:
            return
        if self._packer is not None:
            self._packer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        try:
            self._file.close()
        except OSError:  # it was full; it cannot be closed twice
            return


class JsonlSink(Sink):
    """Lines as they are, plain or compressed. See `Sink`."""

    def __init__(self, path: Path, compression: str | None) -> None:
        self._file = PackedFile(path, compression)

    def write(self, line: bytes) -> None:
        """See `Sink`."""
        self._file.write(line)

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()

    def abandon(self) -> None:
        """See `Sink`."""
        self._file.abandon()
