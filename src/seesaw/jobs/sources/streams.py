"""`InputStream`: the bytes of one input file or of standard input, decompressed as they are read."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import zlib
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from seesaw.core.errors import JobError
from seesaw.jobs.base import COMPRESSED, STDIN

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 20
_PACKED = 1 << 16
_ZSTD_PIECE = 512
"""Bytes decompressed at once. Zeros shrink to 4 bytes per 128 KiB, so that these become 16 MiB at most."""
_MAGICS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh91A": "compressed with bzip2",
    b"ARROW1": "an Arrow file",
}
_HEAD = 8
_ZSTD_WINDOW = 1 << 31


class DamagedStream(Exception):
    """Compressed data that is cut off or corrupt; says how."""


class InputStream:
    """The bytes of `path`, decompressed if they begin as gzip or zstd data do, whatever the name says.

    `reader` gives them. Raises `JobError` where the file cannot be opened or holds something else; reading
    may raise `OSError` or `DamagedStream`, after everything that stands before the damage.
    """

    def __init__(self, path: Path) -> None:
        self._stored = _Stored(path)
        try:
            self.compression = _compression(path, self._stored.head)
        except BaseException:
            self._stored.close()
            raise
        kinds: dict[str | None, Callable[[_Stored], _Unpacked]]
        kinds = {None: _Plain, "gzip": _Gunzip, "zstd": _Unzstd}
        self._unpacked = kinds[self.compression](self._stored)
        self.reader = io.BufferedReader(self._unpacked, _CHUNK)

    @property
    def head(self) -> bytes:
        """The first bytes as they are stored."""
        return self._stored.head

    def share(self) -> float | None:
        """How much of the file, as it is stored, has been read, from 0 to 1; None for a pipe."""
        size = self._stored.size
        if size is None:
            return None
        try:
            read, unpacked = self.reader.tell(), self._unpacked.produced
        except (OSError, ValueError):  # closed meanwhile
            return None
        taken = self._stored.taken * read / unpacked if unpacked else 0.0
        return min(1.0, taken / size) if size else 1.0

    def close(self) -> None:
        """May be called twice."""
        self.reader.close()
        self._stored.close()


def open_binary(path: Path) -> BinaryIO:
    """Raises `JobError`."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> JobError:
    """What to say of a file that cannot be read."""
    return JobError(f"{shown_path(path)}: cannot be read ({error.strerror or error})")


def shown_path(path: Path) -> str:
    """`path` as messages name it."""
    return "standard input" if path == STDIN else str(path)


class _Stored:
    """A file as it is stored: its first bytes looked at, the rest handed out and counted."""

    def __init__(self, path: Path) -> None:
        self.size: int | None = None
        self.taken = 0
        """Bytes handed out."""
        if path == STDIN:
            self._file: BinaryIO = sys.stdin.buffer
        else:
            self._file = open_binary(path)
            status = os.fstat(self._file.fileno())
            if stat.S_ISREG(status.st_mode):
                self.size = status.st_size
        self._owned = path != STDIN
        try:
            self.head = self._peek()
        except OSError as error:
            self.close()
            raise unreadable(path, error) from error
        self._ahead = self.head

    def _peek(self) -> bytes:
        head = b""
        while len(head) < _HEAD and (piece := self._file.read(_HEAD - len(head))):
            head += piece
        return head

    def read(self, size: int) -> bytes:
        """At most `size` bytes, as many as are there; none at the end."""
        if self._ahead:
            piece, self._ahead = self._ahead[:size], self._ahead[size:]
        elif isinstance(self._file, io.BufferedReader):
            piece = self._file.read1(size)
        else:
            piece = self._file.read(size)
        self.taken += len(piece)
        return piece

    def close(self) -> None:
        if self._owned:
            self._file.close()


class _Unpacked(io.RawIOBase):
    """A raw stream that counts what it gives."""

    def __init__(self, stored: _Stored) -> None:
        self._stored = stored
        self.produced = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.produced

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._some(len(view))
        view[: len(data)] = data
        self.produced += len(data)
        return len(data)

    @abstractmethod
    def _some(self, size: int) -> bytes:
        """From 1 to `size` bytes; none at the end."""


class _Plain(_Unpacked):
    def _some(self, size: int) -> bytes:
        return self._stored.read(size)


class _Gunzip(_Unpacked):
    """Any number of gzip members."""

    def __init__(self, stored: _Stored) -> None:
        super().__init__(stored)
        self._gzip = gzip.GzipFile(fileobj=stored, mode="rb")  # type: ignore[call-overload]

    def _some(self, size: int) -> bytes:
        try:
            # read1 gives what there is before it meets the damage; read would lose that.
            data: bytes = self._gzip.read1(size)
        except EOFError as error:
            raise DamagedStream("the gzip data end too early; the file is incomplete") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DamagedStream(f"the gzip data are damaged: {error}") from error
        return data


class _Unzstd(_Unpacked):
    """Any number of zstd frames, with windows as large as `zstd --long=31` makes them.

    The library's own file reader takes a file that is cut off for one that ends; the end of each frame is
    therefore checked here.
    """

    def __init__(self, stored: _Stored) -> None:
        import zstandard

        super().__init__(stored)
        self._error = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._packed = memoryview(b"")
        self._ready = memoryview(b"")

    def _some(self, size: int) -> bytes:
        while not self._ready:
            if not self._packed:
                self._packed = memoryview(self._stored.read(_PACKED))
                if not self._packed:
                    if self._frame is not None:
                        raise DamagedStream("the zstd data end too early; the file is incomplete")
                    return b""
            self._unpack()
        data, self._ready = self._ready[:size], self._ready[size:]
        return bytes(data)

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._unpacker.decompressobj()
        piece, self._packed = self._packed[:_ZSTD_PIECE], self._packed[_ZSTD_PIECE:]
        try:
            data = self._frame.decompress(piece)
        except self._error as error:
            reason = str(error).removeprefix("zstd decompressor error: ")
            raise DamagedStream(f"the zstd data are damaged: {reason}") from error
        if self._frame.eof:
            rest = len(self._frame.unused_data)
            if rest:
                self._packed = memoryview(bytes(piece[-rest:]) + bytes(self._packed))
            self._frame = None
        self._ready = memoryview(data)


def _compression(path: Path, head: bytes) -> str | None:
    """How the bytes that begin with `head` are compressed. Raises `JobError` if that cannot be read."""
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            return name
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a zstd frame to be skipped comes first
        return "zstd"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise JobError(
                f"{shown_path(path)}: is {what}; JSONL, CSV, TSV (also .gz and .zst) and Parquet are read"
            )
    expected = COMPRESSED.get(path.suffix.lower())
    # A server may have decompressed what it sent and left the name as it was.
    text = all(byte >= 0x20 or byte in b"\t\r\n" for byte in head)
    if expected is not None and (not text or any(magic.startswith(head) for magic in _MAGICS)):
        found = f"begins with {head[:4].hex(' ')}" if head else "is empty"
        raise JobError(f"{shown_path(path)}: is named as a {expected} file, but {found}")
    return None
