"""Measures a rig from inside: throughput and round trips of each pair of ranks, pace and reads of each rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from seesaw.core.node import Node, Place
from seesaw.execution.placement import enter

_CHUNK = 1 << 20
_WARM_UP = 0.15
"""Seconds at the start of a transfer that do not count: the bucket is full and the window still grows."""
ROUND_TRIP_BYTES = (64, 64 << 10, 1 << 20)


class RankProbe:
    """A process in the place of one rank; `ask` starts a measurement there and `answer` waits for it."""

    def __init__(self, place: Place) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.address = place.address or "127.0.0.1"
        self._process = context.Process(target=_serve, args=(place, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process in the rank's place."""
        return self._process.pid or 0

    def ask(self, name: str, *args: object) -> None:
        """Start a measurement."""
        self._pipe.send((name, args))

    def answer(self) -> Any:
        """Its result; raises what it raised."""
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def call(self, name: str, *args: object) -> Any:
        """Both."""
        self.ask(name, *args)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)  # closing our end would not do: probes forked later have it too
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def rank_probes(node: Node) -> Iterator[list[RankProbe]]:
    """A probe in every place of the node."""
    probes: list[RankProbe] = []
    try:
        for place in node.ranks:
            probes.append(RankProbe(place))
        yield probes
    finally:
        for probe in probes:
            probe.close()


def throughput(sender: RankProbe, receiver: RankProbe, seconds: float = 0.5) -> float:
    """Bits per second of user data over one connection."""
    port = receiver.call("listen")
    receiver.ask("receive")
    sender.call("send", receiver.address, port, seconds + _WARM_UP)
    return float(receiver.answer())


def ring(probes: list[RankProbe], seconds: float = 0.5) -> list[float]:
    """Bits per second that each rank receives while all send to the next at once."""
    ports = [probe.call("listen") for probe in probes]
    for rank, probe in enumerate(probes):
        following = (rank + 1) % len(probes)
        probe.ask("receive_and_send", probes[following].address, ports[following], seconds + _WARM_UP)
    return [float(probe.answer()) for probe in probes]


def round_trip(sender: RankProbe, receiver: RankProbe, size: int, count: int = 100) -> tuple[float, float]:
    """Median and 95th percentile, in seconds, of sending `size` bytes there and back."""
    port = receiver.call("listen")
    receiver.ask("echo", size)
    median, high = sender.call("ping", receiver.address, port, size, count)
    receiver.answer()
    return median, high


def pace(probes: list[RankProbe], dtype: str, seconds: float = 0.7) -> list[float]:
    """FLOP/s of square matrix products in each of these ranks, all at once."""
    for probe in probes:
        probe.ask("multiply", dtype, seconds)
    return [probe.answer() for probe in probes]


def reads(probes: list[RankProbe], dtype: str, seconds: float = 0.7) -> list[float]:
    """Bytes per second of weights read by matrix-vector products in each of these ranks, all at once."""
    for probe in probes:
        probe.ask("read", dtype, seconds)
    return [probe.answer() for probe in probes]


# ---- in the rank's process ------------------------------------------------------------------------------------


class _Rank:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._listener: socket.socket | None = None

    def listen(self) -> int:
        self._listener = socket.create_server((self._place.address or "127.0.0.1", 0))
        return int(self._listener.getsockname()[1])

    def receive(self) -> float:
        with self._accept() as connection:
            return _drain(connection)

    def send(self, address: str, port: int, seconds: float) -> None:
        with _connect(address, port) as connection:
            payload, end = memoryview(bytes(_CHUNK)), time.monotonic() + seconds
            while time.monotonic() < end:
                connection.sendall(payload)

    def receive_and_send(self, address: str, port: int, seconds: float) -> float:
        sender = threading.Thread(target=self.send, args=(address, port, seconds))
        sender.start()
        try:
            return self.receive()
        finally:
            sender.join()

    def echo(self, size: int) -> None:
        buffer = memoryview(bytearray(size))
        with self._accept() as connection:
            while _fill(connection, buffer):
                connection.sendall(buffer)

    def ping(self, address: str, port: int, size: int, count: int) -> tuple[float, float]:
        buffer, times = memoryview(bytearray(size)), []
        with _connect(address, port) as connection:
            for _ in range(count + 10):
                start = time.perf_counter()
                connection.sendall(buffer)
                _fill(connection, buffer)
                times.append(time.perf_counter() - start)
        times = sorted(times[10:])
        return statistics.median(times), times[int(len(times) * 0.95)]

    def multiply(self, dtype: str, seconds: float) -> float:
        import torch

        side = 1024
        a, b = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
        return 2 * side**3 * _per_second(lambda: torch.mm(a, b), seconds)

    def read(self, dtype: str, seconds: float) -> float:
        import torch

        matrix = torch.randn(8192, 4096).to(getattr(torch, dtype))  # larger than any cache near the core
        vector = torch.randn(4096).to(matrix.dtype)
        return matrix.nbytes * _per_second(lambda: torch.mv(matrix, vector), seconds)

    def _accept(self) -> socket.socket:
        assert self._listener is not None
        with self._listener:
            connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def _serve(place: Place, pipe: Connection) -> None:
    try:
        enter(place)
        _one_thread_per_core(place)
        problem = None
    except Exception as error:
        problem = error
    rank = _Rank(place)
    while True:
        request = pipe.recv()
        if request is None:
            return
        name, args = request
        try:
            pipe.send(problem or getattr(rank, name)(*args))
        except Exception as error:
            pipe.send(error)


def _one_thread_per_core(place: Place) -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(max(1, len(place.cores)))


def _connect(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _drain(connection: socket.socket) -> float:
    """Bits per second from the warm-up to the last byte."""
    buffer = memoryview(bytearray(_CHUNK))
    start = time.monotonic()
    counted, since, now = 0, 0.0, start
    while count := connection.recv_into(buffer):
        now = time.monotonic()
        if since:
            counted += count
        elif now - start >= _WARM_UP:
            since = now
    return 8 * counted / (now - since) if counted else 0.0


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    got = 0
    while got < len(buffer):
        count = connection.recv_into(buffer[got:])
        if count == 0:
            return False
        got += count
    return True


def _per_second(work: Callable[[], object], seconds: float) -> float:
    for _ in range(2):
        work()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or count == 0:
        work()
        count += 1
    return count / elapsed
