"""The process that is the rig: it builds everything, holds the namespaces open, and removes the control groups.

    python -m benchmarks.rig.keeper SETTINGS-AS-JSON OWNER-PID

It ends when its owner does (however that happens), when its standard input closes, or on SIGTERM; with owner 0, on
SIGTERM alone. The namespaces and the node file are descriptors of this process, so the kernel removes them in any
case. Its first and only line of output is a `Report`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from seesaw.core.errors import StartupError
from seesaw.core.node import Node, Place
from seesaw.execution.placement import enter

from .cgroups import Hierarchy, RigGroups, find_hierarchy, groups_of, remove_stale
from .errors import RigError
from .network import INTERFACE, Step, address, steps, sysctls
from .processes import users_of
from .report import NODE_NAME, Report
from .settings import Settings

_CLONE_NEWNET = 0x40000000


class Keeper:
    """Builds a rig and holds it until `close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hierarchy = find_hierarchy()
        self._groups: RigGroups | None = None
        self._namespaces: list[int] = []
        self._hub = -1
        self._node = -1

    def build(self) -> Report:
        """Set everything up. Raises `RigError`; `close` then removes what there is."""
        remove_stale(self._hierarchy)
        self._make_groups(self._hierarchy)
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._hub = _new_namespace()
        self._namespaces = [_new_namespace() for _ in range(self._settings.ranks)]
        for rank in range(-1, self._settings.ranks):
            self._visit(rank)
            for name, values in sysctls(rank).items():
                tell_kernel(Path("/proc/sys/net", name), values)
        for step in steps(self._settings, [_descriptor(fd) for fd in self._namespaces]):
            self._visit(step.namespace)
            _carry_out(step)
        enter(Place(netns=_descriptor(home)))
        os.close(home)
        return self._publish()

    def close(self) -> None:
        """End what runs on the rig and remove its control groups; the rest goes with this process."""
        if self._groups is not None:
            self._groups.remove()
        inodes = {os.fstat(fd).st_ino for fd in (*self._namespaces, self._hub) if fd >= 0}
        for pid in users_of(inodes) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _make_groups(self, hierarchy: Hierarchy | None) -> None:
        if hierarchy is None:
            if self._settings.quota is not None:
                raise RigError("CPU quotas need the control-group controller `cpu`, and none is mounted here")
            return
        self._groups = groups_of(hierarchy, os.getpid())
        try:
            self._groups.create(self._settings)
        except RigError:
            self._groups.remove()
            if self._settings.quota is not None:
                raise
            self._groups = None  # without a quota they only gather the processes

    def _visit(self, rank: int) -> None:
        enter(Place(netns=_descriptor(self._hub if rank < 0 else self._namespaces[rank])))

    def _publish(self) -> Report:
        """Write the node file into memory that has no name in the file system."""
        places = [
            Place(
                address=address(rank),
                interface=INTERFACE,
                netns=_descriptor(fd),
                cgroups=[str(self._groups.rank(rank))] if self._groups else [],
                cores=self._settings.cores[rank],
            )
            for rank, fd in enumerate(self._namespaces)
        ]
        self._node = os.memfd_create(NODE_NAME)
        os.write(self._node, msgspec.json.format(msgspec.json.encode(Node(places))))
        command = str(self._groups.command) if self._groups else None
        return Report(_descriptor(self._node), command)


def _descriptor(fd: int) -> str:
    """The path by which any process reaches a descriptor of this one."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _new_namespace() -> int:
    """Go to a new network namespace and return a descriptor that holds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise RigError(
            f"cannot make a network namespace: {reason}; it needs root and a kernel with CONFIG_NET_NS"
        )
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def tell_kernel(setting: Path, values: tuple[str, ...]) -> None:
    """Set it to the first of `values` that the kernel takes; one without the part has nothing to be told."""
    for value in values:
        with contextlib.suppress(OSError):
            setting.write_text(value)
            return


def _carry_out(step: Step) -> None:
    done = subprocess.run(step.argv, input=step.stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise RigError(f"the kernel or `{step.argv[0]}` refuses {step.needs}, which the rig needs: {said}")


def _wait(owner: int) -> None:
    """Until the owner has ended or closed our standard input; for ever without one (a signal ends that)."""
    if owner == 0:
        while True:
            time.sleep(3600)
    poll = select.poll()
    with contextlib.suppress(ProcessLookupError):  # gone already: its end of the pipe is closed
        poll.register(os.pidfd_open(owner), select.POLLIN)
    poll.register(0, select.POLLIN)
    poll.poll()


def main() -> int:
    """Keep one rig."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings, owner = msgspec.json.decode(sys.argv[1], type=Settings), int(sys.argv[2])
    keeper = Keeper(settings)
    try:
        try:
            report = keeper.build()
        except (RigError, StartupError, OSError) as error:
            report = Report(error=str(error))
        with contextlib.suppress(BrokenPipeError):
            os.write(1, msgspec.json.encode(report) + b"\n")
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        if report.error is None:
            _wait(owner)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
