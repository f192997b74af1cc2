"""Puts a worker where its `Place` says: control groups, network namespace, processor cores.

A process joins its control groups as a whole. A namespace holds for the calling thread and for those it starts
later, and a socket stays in the namespace in which it was made: the control process's messages (ZeroMQ, over
abstract Unix addresses, which belong to a namespace) go on through sockets connected before.
"""

from __future__ import annotations

import ctypes
import os

from seesaw.core.errors import StartupError
from seesaw.core.node import Place

_CLONE_NEWNET = 0x40000000


def enter(place: Place) -> None:
    """Take the calling thread, and its process, to `place`.

    Called in the main thread before `torch.distributed` starts, and before any socket or thread that is meant to
    live in the namespace; ZeroMQ sockets to the control process are connected before it. Raises `StartupError`.
    """
    for cgroup in place.cgroups:  # first: mounts that belong to a namespace may hide their paths
        _join_cgroup(cgroup)
    if place.netns is not None:
        _enter_network(place.netns)
    if place.cores:
        _bind(place.cores)


def _join_cgroup(directory: str) -> None:
    path = os.path.join(directory, "cgroup.procs")
    try:
        fd = os.open(
            path, os.O_WRONLY
        )  # never creates it: a directory that is not a control group is an error
        try:
            os.write(fd, str(os.getpid()).encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise StartupError(
            f"cannot join the control group {directory}: {error.strerror}; it must exist while the engine starts, "
            "and joining it needs the right to write its cgroup.procs (usually root)"
        ) from None


def _enter_network(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StartupError(
            f"cannot enter the network namespace {path}: {error.strerror}; what holds it must still run, "
            "and entering it needs root (CAP_SYS_ADMIN)"
        ) from None


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns needs Python 3.12
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _bind(cores: list[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        allowed = sorted(os.sched_getaffinity(0))
        raise StartupError(
            f"cannot bind to the cores {cores}: {error.strerror}; this process may use {allowed}"
        ) from None
