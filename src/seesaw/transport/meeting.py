"""How ranks on separate networks find each other and connect, every one with every other.

Each rank listens on its own address and writes `address port` into a file of the rendezvous directory, which
all ranks see and others cannot. A random token in that directory tells ranks from strangers: a connection
that does not begin with it is dropped. The higher of two ranks makes the connections between them.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from seesaw.core.errors import StartupError

SOCKET_BUFFER = 2 << 20
"""Asked of the kernel per connection and direction, where it lets us choose; it takes twice that, overhead included.

A rank under a CPU quota stands still for some milliseconds at a time: at 4 Gbit/s that is 2 MB. What waits for
longer is kept by the transport, and larger buffers only push data out of the caches.
"""

_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sII")
"""What a connection begins with: token, rank, link."""

_POLL_SECONDS = 0.01
_RCVBUFFORCE, _SNDBUFFORCE = 33, 32


@dataclass(slots=True)
class Meeting:
    """One rank's side of setting up the mesh; gives up at `deadline`, a time of the monotonic clock."""

    rank: int
    world: int
    links: int
    """Connections per pair of ranks."""
    directory: Path
    timeout: float
    connections: dict[tuple[int, int], socket.socket] = field(default_factory=dict)
    """By peer and link; closed with `close` unless they are detached before."""
    deadline: float = field(init=False)

    def connect_all(self, address: str) -> None:
        """Connect with all other ranks. Raises `StartupError` naming the ranks that did not come."""
        self.deadline = time.monotonic() + self.timeout
        try:
            listener = socket.create_server(
                (address, 0), family=_family(address), backlog=self.world * self.links
            )
        except OSError as error:
            raise StartupError(
                f"transport: rank {self.rank} cannot listen on address {address}: {error}"
            ) from error
        with listener:
            _tune(listener)
            port = listener.getsockname()[1]
            _write_whole(self.directory / f"rank{self.rank}", f"{address} {port}".encode())
            token = _shared_token(self.directory)
            for peer in range(self.rank):
                self._connect(peer, token)
            self._accept(listener, token)

    def close(self) -> None:
        """Close what connections there are."""
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()

    def _connect(self, peer: int, token: bytes) -> None:
        """Connect with a lower rank as soon as it listens."""
        path = self.directory / f"rank{peer}"
        while not path.exists():
            self._check_time()
            time.sleep(_POLL_SECONDS)
        host, port = path.read_text().split()
        for link in range(self.links):
            connection = socket.socket(_family(host), socket.SOCK_STREAM)
            try:
                _tune(connection)
                connection.settimeout(max(0.01, self.deadline - time.monotonic()))
                connection.connect((host, int(port)))
                connection.sendall(_HELLO.pack(token, self.rank, link))
            except OSError as error:
                connection.close()
                raise StartupError(
                    f"transport: rank {self.rank} cannot reach rank {peer} at {host}:{port}: {error}"
                ) from error
            self.connections[peer, link] = connection

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        """Take the connections of all higher ranks; strangers may connect and stay silent meanwhile."""
        wanted = (self.world - 1 - self.rank) * self.links + len(self.connections)
        listener.setblocking(False)
        hellos: dict[socket.socket, bytearray] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            try:
                while len(self.connections) < wanted:
                    self._check_time()
                    for key, _ in selector.select(min(0.2, max(0.0, self.deadline - time.monotonic()))):
                        connection = key.fileobj
                        assert isinstance(connection, socket.socket)
                        if connection is listener:
                            with contextlib.suppress(OSError):
                                guest, _ = listener.accept()
                                guest.setblocking(False)
                                hellos[guest] = bytearray()
                                selector.register(guest, selectors.EVENT_READ)
                        elif self._hear(connection, hellos[connection], token):
                            selector.unregister(connection)
                            del hellos[connection]
            finally:
                for guest in hellos:
                    guest.close()

    def _hear(self, connection: socket.socket, hello: bytearray, token: bytes) -> bool:
        """Read on in a guest's greeting; True when it has been admitted or turned away."""
        try:
            part = connection.recv(_HELLO.size - len(hello))
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        hello += part
        if part and len(hello) < _HELLO.size:
            return False
        if part:
            given, peer, link = _HELLO.unpack(hello)
            known = hmac.compare_digest(given, token) and self.rank < peer < self.world and link < self.links
            if known and (peer, link) not in self.connections:
                _tune(connection)
                self.connections[peer, link] = connection
                return True
        connection.close()
        return True

    def _check_time(self) -> None:
        if time.monotonic() < self.deadline:
            return
        come = {peer for peer, link in self.connections if (peer, self.links - 1) in self.connections}
        absent = [peer for peer in range(self.world) if peer != self.rank and peer not in come]
        unheard = [peer for peer in absent if not (self.directory / f"rank{peer}").exists()]
        ranks = unheard or absent
        raise StartupError(
            f"transport: rank {self.rank} has no connection to rank{'s' * (len(ranks) > 1)} "
            f"{', '.join(map(str, ranks))} of {self.world} after {self.timeout:g} s"
        )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _tune(connection: socket.socket) -> None:
    """Set before connecting, for the window's scale is agreed upon then.

    The sizes are forced or left to the kernel's own tuning: merely asked for, they would be capped, and the
    tuning switched off.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (_RCVBUFFORCE, _SNDBUFFORCE):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)


def _shared_token(directory: Path) -> bytes:
    """The token of this directory; the first rank to ask makes it."""
    path = directory / "token"
    if not path.exists():
        _write_whole(path, secrets.token_bytes(_TOKEN_BYTES), replace=False)
    return path.read_bytes()


def _write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file that others see complete or not at all, readable by this user alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    if replace:
        os.replace(name, path)
        return
    with contextlib.suppress(FileExistsError):
        os.link(name, path)
    os.unlink(name)
