"""`SocketTransport`: ranks on separate networks, connected by TCP (`native/socket_exchange.cpp`)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from seesaw.core.errors import ConfigError
from seesaw.native import build
from seesaw.native.pointers import TensorPointer
from seesaw.native.program import RecordedLibrary, Recorder
from seesaw.transport.base import Members
from seesaw.transport.calls import CHANNELS, DONE, PENDING, Closed, member_array, run_to_end, sum_type
from seesaw.transport.meeting import Meeting

BUFFER_BYTES = 512 << 20
"""What `send` queues for one peer and channel before it waits, and what is read ahead of `receive`, at most.

Memory is taken as it is needed, and kept for the next messages.
"""

ONE_ROUND_BYTES = 20 << 10
"""What a link carries in the time that one more round of a collective costs: 150 µs at 1 Gbit/s.

An all-reduce of b bytes over n ranks takes (n - 1) b of wire time in one round and 2 (n - 1)/n b in two, which
is (n - 1)(n - 2)/n b less. So one round serves while that is below this figure: always between two ranks, up to
30 KB between three, 13 KB between four, 4 KB between eight. Faster links have shorter rounds: at 4 Gbit/s the
figure grows to some 50 KB, and either choice is a few per cent from the other.
"""

_MISMATCH, _CLOSED = 2, 3


def native_library() -> ctypes.CDLL | None:
    """The native library with its calls declared; None where it cannot be had or the system is not Linux."""
    library = build.load()
    if library is None or not hasattr(library, "seesaw_tcp_open"):
        return None
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    numbers = ctypes.POINTER(i32)
    for name, result, *arguments in (
        ("links", i32),
        ("open", pointer, numbers, i32, i32, i64, i64),
        ("close", None, pointer),
        ("failed_peer", i32, pointer),
        ("failed_error", i32, pointer),
        ("all_reduce", i32, pointer, TensorPointer, i64, i32, numbers, i32),
        ("begin_all_reduce", None, pointer, TensorPointer, ctypes.POINTER(i64), i32, i32, numbers, i32),
        ("computed", i32, pointer),
        ("all_computed", i32, pointer),
        ("gather", i32, pointer, pointer, i64, pointer, numbers, i32),
        ("broadcast", i32, pointer, pointer, i64, i32, numbers, i32),
        ("resume", i32, pointer),
        ("send", i32, pointer, pointer, i64, i32, i32),
        ("receive", i32, pointer, pointer, i64, i32, i32),
        ("resume_receive", i32, pointer),
        ("flush", i32, pointer),
    ):
        function = getattr(library, f"seesaw_tcp_{name}")
        function.argtypes, function.restype = arguments, result
    return library


class SocketTransport:
    """One rank's end of a full mesh of TCP connections; see `Transport`. Waits without spinning.

    Sums may travel while they are computed (`PartialSums`): their first parts are on the way meanwhile, as far as
    the kernel's buffers take them. A call that needs a peer whose connection has closed raises `ConnectionError`,
    which names the rank. A rank whose call was broken off by an exception can only `close`.
    """

    name = "tcp"
    capturable = False

    def __init__(
        self,
        rank: int,
        world: int,
        directory: str | Path,
        address: str,
        *,
        timeout: float,
        buffer_bytes: int = BUFFER_BYTES,
        one_round_bytes: int = ONE_ROUND_BYTES,
    ) -> None:
        """Listen on `address`, an IP address of this rank, and connect with all ranks within `timeout` seconds.

        The ranks find each other through files in `directory`, which must be new and closed to other users;
        it may go as soon as all ranks are up. Sizes must be the same on all ranks. Raises `StartupError` naming
        the ranks that did not come, and `ConfigError` without the native library.
        """
        self._rank, self._world = rank, world
        library = native_library()
        if library is None:
            raise ConfigError(
                "transport 'tcp' needs the native library, which cannot be built here; use 'gloo' or 'auto'"
            )
        self._library: ctypes.CDLL | RecordedLibrary | Closed = library
        links = library.seesaw_tcp_links()
        meeting = Meeting(rank, world, links, Path(directory), timeout)
        try:
            meeting.connect_all(address)
            fds = (ctypes.c_int32 * (world * links))(*([-1] * world * links))
            for (peer, link), connection in meeting.connections.items():
                fds[peer * links + link] = connection.detach()
        finally:
            meeting.close()
        self._handle = ctypes.c_void_p(
            library.seesaw_tcp_open(fds, rank, world, buffer_bytes, one_round_bytes)
        )

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""
        if len(members) > 1 and x.numel():
            assert x.is_contiguous() and self._rank in members, (x.stride(), members)
            status = self._library.seesaw_tcp_all_reduce(
                self._handle, x, x.numel(), sum_type(x), member_array(members), len(members)
            )
            self._finish(status, "an all-reduce")
        return x

    def all_reduce_in_parts(
        self, x: Tensor, counts: Sequence[int], compute: Callable[[int], object], members: Members
    ) -> Tensor:
        """See `PartialSums.all_reduce_in_parts`."""
        assert x.is_contiguous() and self._rank in members and len(members) > 1, (x.stride(), members)
        assert sum(counts) == x.numel(), (counts, x.shape)
        numbers = (ctypes.c_int64 * len(counts))(*counts)
        self._library.seesaw_tcp_begin_all_reduce(
            self._handle, x, numbers, len(counts), sum_type(x), member_array(members), len(members)
        )
        for part in range(len(counts) - 1):
            compute(part)
            self._check(self._library.seesaw_tcp_computed(self._handle), "an all-reduce")
        compute(len(counts) - 1)
        self._finish(self._library.seesaw_tcp_all_computed(self._handle), "an all-reduce")
        return x

    def recorded_by(self, recorder: Recorder) -> SocketTransport:
        """This transport, whose sums are to be called over stand-ins: `recorder` notes down the native calls."""
        stand_in = copy(self)
        stand_in._library = recorder.library(answer=partial(self._finish, what="an all-reduce"))
        return stand_in

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`; the first member's own entry is `x` itself."""
        assert x.is_contiguous() and self._rank in members, (x.stride(), members)
        parts, pointers = None, None
        if members[0] == self._rank:
            parts = [x, *(torch.empty_like(x) for _ in members[1:])]
            pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
        if len(members) > 1:
            status = self._library.seesaw_tcp_gather(
                self._handle, x.data_ptr(), x.nbytes, pointers, member_array(members), len(members)
            )
            self._finish(status, "a gather")
        return parts

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        if len(members) > 1:
            assert x.is_contiguous() and self._rank in members, (x.stride(), members)
            first = members[0] == self._rank
            status = self._library.seesaw_tcp_broadcast(
                self._handle, x.data_ptr(), x.nbytes, first, member_array(members), len(members)
            )
            self._finish(status, "a broadcast")
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`; waits only while the queue to that rank and channel is full."""
        self._check_message(x, rank, channel)
        status = PENDING
        while status == PENDING:
            status = self._library.seesaw_tcp_send(self._handle, x.data_ptr(), x.nbytes, rank, channel)
        self._check(status, "a message")

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`."""
        self._check_message(x, rank, channel)
        status = self._library.seesaw_tcp_receive(self._handle, x.data_ptr(), x.nbytes, rank, channel)
        status = run_to_end(status, self._library.seesaw_tcp_resume_receive, self._handle)
        assert status != _MISMATCH, (
            f"rank {self._rank}: a message from rank {rank} on channel {channel} has not the {x.nbytes} bytes "
            "expected"
        )
        self._check(status, "a message")
        return x

    def flush(self) -> None:
        """Return once the kernel has everything that was sent."""
        self._check(run_to_end(PENDING, self._library.seesaw_tcp_flush, self._handle), "messages")

    def close(self) -> None:
        """Close the connections. Idempotent."""
        if self._handle:
            self._library.seesaw_tcp_close(self._handle)
            self._handle = ctypes.c_void_p()
            self._library = Closed()

    def _finish(self, status: int, what: str) -> None:
        if status != DONE:
            self._check(run_to_end(status, self._library.seesaw_tcp_resume, self._handle), what)

    def _check(self, status: int, what: str) -> None:
        if status == DONE:
            return
        peer = self._library.seesaw_tcp_failed_peer(self._handle)
        error = self._library.seesaw_tcp_failed_error(self._handle)
        why = "it has closed the connection" if status == _CLOSED else os.strerror(error)
        raise ConnectionError(f"transport: rank {self._rank} lost rank {peer} during {what}: {why}")

    def _check_message(self, x: Tensor, rank: int, channel: int) -> None:
        assert x.is_contiguous() and 0 <= channel < CHANNELS, (x.stride(), channel)
        assert 0 <= rank < self._world and rank != self._rank, rank
