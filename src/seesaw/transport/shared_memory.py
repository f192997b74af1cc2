"""`SharedMemoryTransport`: ranks of one host that share a region of memory (`native/shm_exchange.cpp`)."""

from __future__ import annotations

import ctypes
import fcntl
import os
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from seesaw.core.errors import ConfigError, MemoryBudgetError
from seesaw.native import build
from seesaw.native.pointers import TensorPointer
from seesaw.native.program import RecordedLibrary, Recorder
from seesaw.transport.base import Members
from seesaw.transport.calls import CHANNELS, DONE, Closed, member_array, run_to_end, sum_type
from seesaw.transport.region import BLOCK_BYTES, BLOCKS, SLOT_BYTES

ONE_ROUND_BYTES = 32 << 10
"""Up to here every member reads what all others have; above, each adds up a share and all copy the shares."""

SPIN_SECONDS = 30e-6
"""How long a waiting rank spins before it sleeps, where every rank has a core of its own."""

_MISMATCH = 2


class _Shape(ctypes.Structure):
    """`Shape` of `shm_exchange.cpp`."""

    _fields_ = (
        ("world", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("one_round_bytes", ctypes.c_int64),
        ("blocks", ctypes.c_int64 * CHANNELS),
        ("block_bytes", ctypes.c_int64 * CHANNELS),
    )


def native_library() -> ctypes.CDLL | None:
    """The native library with its calls declared; None where it cannot be had or the system is not Linux."""
    library = build.load()
    if library is None or not hasattr(library, "seesaw_shm_open"):
        return None
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    members = (ctypes.POINTER(i32), i32)
    for name, result, *arguments in (
        ("bytes", i64, ctypes.POINTER(_Shape)),
        ("format", i32, i32, ctypes.POINTER(_Shape)),
        ("open", pointer, i32, i32, i32, i64, ctypes.POINTER(i32)),
        ("close", None, pointer),
        ("resume", i32, pointer),
        ("found_bytes", i64, pointer),
        ("all_reduce", i32, pointer, TensorPointer, i64, i32, *members),
        ("gather", i32, pointer, pointer, i64, pointer, *members),
        ("broadcast", i32, pointer, pointer, i64, i32, *members),
        ("send", i32, pointer, pointer, i64, i32, i32),
        ("receive", i32, pointer, pointer, i64, i32, i32),
    ):
        function = getattr(library, f"seesaw_shm_{name}")
        function.argtypes, function.restype = arguments, result
    return library


def _library() -> ctypes.CDLL:
    library = native_library()
    if library is None:
        raise ConfigError(
            "transport 'shm' needs the native library, which cannot be built here; use 'gloo' or 'auto'"
        )
    return library


def create_region(
    world: int,
    *,
    slot_bytes: int = SLOT_BYTES,
    one_round_bytes: int = ONE_ROUND_BYTES,
    blocks: tuple[int, int] = BLOCKS,
    block_bytes: tuple[int, int] = BLOCK_BYTES,
) -> int:
    """A file descriptor of a new region for one set of `world` ranks; the caller closes it.

    It may do so when all ranks have attached; the system frees the memory with the last of them. A region
    serves once: ranks that are started anew need a new one. Raises `ConfigError` without the native library
    and `MemoryBudgetError` if the system refuses.
    """
    assert world > 0 and slot_bytes % 64 == 0 and 0 <= one_round_bytes <= slot_bytes, (world, slot_bytes)
    assert min(blocks) > 0 and min(block_bytes) > 0, (blocks, block_bytes)
    library = _library()
    shape = _Shape(
        world,
        slot_bytes,
        one_round_bytes,
        (ctypes.c_int64 * CHANNELS)(*blocks),
        (ctypes.c_int64 * CHANNELS)(*block_bytes),
    )
    size = library.seesaw_shm_bytes(ctypes.byref(shape))
    fd = os.memfd_create("seesaw-transport", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        error = library.seesaw_shm_format(fd, ctypes.byref(shape))
        if error:
            raise OSError(error, os.strerror(error))
    except OSError as error:
        os.close(fd)
        raise MemoryBudgetError(
            f"transport: {size:,} bytes of shared memory for {world} ranks cannot be reserved: {error}"
        ) from error
    return fd


class SharedMemoryTransport:
    """One rank's end of a region; see `Transport`. Never sleeps on a lock: a dead peer means waiting for ever.

    A rank whose call was broken off by an exception can only `close`.
    """

    name = "shm"
    capturable = False

    def __init__(self, fd: int, rank: int, world: int, *, spin_seconds: float | None = None) -> None:
        """Attach to the region `fd`, which stays the caller's; once per rank and region.

        `spin_seconds` is how long to spin before sleeping where every rank has a core of its own (None: 30 µs,
        and none under a CPU quota below one core). Raises `ConfigError` if `fd` is no region for `world` ranks.
        """
        self._rank, self._world = rank, world
        self._library: ctypes.CDLL | RecordedLibrary | Closed = _library()
        if spin_seconds is None:
            spin_seconds = SPIN_SECONDS if cpu_quota() >= 1.0 else 0.0
        error = ctypes.c_int32()
        address = self._library.seesaw_shm_open(fd, rank, world, int(spin_seconds * 1e9), ctypes.byref(error))
        if address is None:
            why = os.strerror(error.value) if error.value > 0 else f"it is not a region for {world} ranks"
            raise ConfigError(f"transport: rank {rank} cannot map the shared region: {why}")
        self._handle = ctypes.c_void_p(address)

    def all_reduce(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.all_reduce`."""
        if len(members) > 1 and x.numel():
            assert x.is_contiguous() and self._rank in members, (x.stride(), members)
            self._finish(
                self._library.seesaw_shm_all_reduce(
                    self._handle, x, x.numel(), sum_type(x), member_array(members), len(members)
                )
            )
        return x

    def recorded_by(self, recorder: Recorder) -> SharedMemoryTransport:
        """This transport, whose sums are to be called over stand-ins: `recorder` notes down the native calls."""
        stand_in = copy(self)
        stand_in._library = recorder.library(answer=self._finish)
        return stand_in

    def gather(self, x: Tensor, members: Members) -> list[Tensor] | None:
        """See `Transport.gather`; the first member's own entry is `x` itself."""
        assert x.is_contiguous() and self._rank in members, (x.stride(), members)
        parts, pointers = None, None
        if members[0] == self._rank:
            parts = [x, *(torch.empty_like(x) for _ in members[1:])]
            pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
        if len(members) > 1:
            self._finish(
                self._library.seesaw_shm_gather(
                    self._handle, x.data_ptr(), x.nbytes, pointers, member_array(members), len(members)
                )
            )
        return parts

    def broadcast(self, x: Tensor, members: Members) -> Tensor:
        """See `Transport.broadcast`."""
        if len(members) > 1:
            assert x.is_contiguous() and self._rank in members, (x.stride(), members)
            first = members[0] == self._rank
            self._finish(
                self._library.seesaw_shm_broadcast(
                    self._handle, x.data_ptr(), x.nbytes, first, member_array(members), len(members)
                )
            )
        return x

    def send(self, x: Tensor, rank: int, channel: int) -> None:
        """See `Transport.send`; waits only while the ring's blocks are all taken."""
        self._check_message(x, rank, channel)
        self._finish(
            self._library.seesaw_shm_send(self._handle, x.data_ptr(), x.nbytes, rank, channel),
        )

    def receive(self, x: Tensor, rank: int, channel: int) -> Tensor:
        """See `Transport.receive`."""
        self._check_message(x, rank, channel)
        status = self._finish(
            self._library.seesaw_shm_receive(self._handle, x.data_ptr(), x.nbytes, rank, channel)
        )
        assert status != _MISMATCH, (
            f"rank {self._rank}: a message of {self._library.seesaw_shm_found_bytes(self._handle)} bytes from "
            f"rank {rank} on channel {channel}, {x.nbytes} expected"
        )
        return x

    def flush(self) -> None:
        """What was sent lies in the region: there is nothing to wait for."""

    def close(self) -> None:
        """Unmap the region. Idempotent."""
        if self._handle:
            self._library.seesaw_shm_close(self._handle)
            self._handle = ctypes.c_void_p()
            self._library = Closed()

    def _finish(self, status: int) -> int:
        if status != DONE:
            status = run_to_end(status, self._library.seesaw_shm_resume, self._handle)
        return status

    def _check_message(self, x: Tensor, rank: int, channel: int) -> None:
        assert x.is_contiguous() and 0 <= channel < CHANNELS, (x.stride(), channel)
        assert 0 <= rank < self._world and rank != self._rank, rank


def cpu_quota(
    membership: Path = Path("/proc/self/cgroup"), control_groups: Path = Path("/sys/fs/cgroup")
) -> float:
    """Cores that this process's control group may use at a time; infinity where no limit can be seen."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            limits = _read(control_groups / inside / "cpu.max").split()
        elif "cpu" in controllers.split(","):
            folder = control_groups / "cpu" / inside
            limits = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        else:
            continue
        if len(limits) == 2 and all(limit.isdigit() for limit in limits):
            return int(limits[0]) / int(limits[1])
    return float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
