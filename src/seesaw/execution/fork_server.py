"""A process that has imported torch once and forks workers from itself.

The control process starts it on first use (`python -m seesaw.execution.fork_server`) with one end of a socket
pair as its standard input. Each request on the socket is a msgpack `WorkerConfig`, framed by its length; the
answer is the worker's process id. When the control process ends, for whatever reason, the socket closes: the
server ends, and with it, by the parent-death signal, every worker.

`multiprocessing`'s own fork server is not used because it imports the user's main script again in each child.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import msgspec

from seesaw.core.errors import StartupError
from seesaw.core.process import die_with_parent
from seesaw.execution.heap import with_huge_pages
from seesaw.execution.messages import WorkerConfig

_LENGTH = struct.Struct("<I")


class ForkServer:
    """The control process's end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "seesaw.execution.fork_server"],
                stdin=theirs.fileno(),
                env=with_huge_pages(os.environ),
            )

    def fork(self, config: WorkerConfig) -> int:
        """Start a worker; returns its process id. Raises `StartupError` if the server is gone."""
        data = msgspec.msgpack.encode(config)
        try:
            with self._lock:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
                answer = _receive(self._socket, _LENGTH.size)
        except OSError:
            answer = None
        if answer is None:
            raise StartupError("the process that starts workers has ended; see its output above")
        return int(_LENGTH.unpack(answer)[0])

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the server and any worker it still has."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


_server: ForkServer | None = None
_server_lock = threading.Lock()


def fork_server() -> ForkServer:
    """The server of this process, started at the first call. Calling it early hides the time torch takes."""
    global _server
    with _server_lock:
        if _server is None or not _server.alive:
            _server = ForkServer()
            atexit.register(_server.close)
        return _server


def _receive(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _serve(connection: socket.socket) -> None:
    from seesaw.execution.worker import worker_main
    from seesaw.native.build import load

    load()  # compiled, if need be, before there are workers to wait for it
    while True:
        header = _receive(connection, _LENGTH.size)
        if header is None:
            return
        data = _receive(connection, _LENGTH.unpack(header)[0])
        if data is None:
            return
        child = os.fork()
        if child == 0:
            connection.close()
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = worker_main(msgspec.msgpack.decode(data, type=WorkerConfig))
            os._exit(code)
        connection.sendall(_LENGTH.pack(child))


def _main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    connection = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(ConnectionError):
        _serve(connection)


if __name__ == "__main__":
    _main()
