"""The owner's end of a rig: starts the keeper, knows the node file, ends the keeper."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from seesaw.core.node import Node, load_node

from .cgroups import find_hierarchy, remove_stale
from .errors import RigError
from .processes import with_arguments
from .report import NODE_NAME, Report
from .settings import Settings, make_settings

_PACKAGE = __name__.rpartition(".")[0]
_TOP = Path(__file__).resolve().parents[_PACKAGE.count(".") + 1]


class Rig:
    """An emulated node that lasts as long as this object, or this process.

    `node_file` is what the engine's `node` takes. Arguments are those of `make_settings`. Raises `RigError` where the
    machine cannot do it. The rig ends with `close`, with the `with` block, or with the process, and whatever runs
    on it is killed then.
    """

    def __init__(
        self,
        ranks: int,
        link: str | None = None,
        quota: float | str | None = "auto",
        *,
        burst: int | None = None,
        mtu: int | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        self.settings = make_settings(ranks, link=link, quota=quota, burst=burst, mtu=mtu, cores=cores)
        self._keeper, report = start_keeper(self.settings, os.getpid())
        self.node_file = report.node_file
        self.command_group = report.command_group
        """Control group for whatever is run on the rig, so that it ends with it; None where there is none."""

    @property
    def node(self) -> Node:
        """The places of the ranks."""
        return load_node(self.node_file)

    @property
    def keeper_pid(self) -> int:
        """The process that holds the rig."""
        return self._keeper.pid

    def close(self) -> None:
        """End the rig and everything on it."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        remove_stale(find_hierarchy())  # ours, should the keeper have been killed

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_keeper(wanted: Settings, owner: int) -> tuple[subprocess.Popen[bytes], Report]:
    """Start the process that keeps a rig for process `owner`, or, with 0, until it is told to end."""
    check_machine()
    process = subprocess.Popen(
        [sys.executable, "-m", f"{_PACKAGE}.keeper", msgspec.json.encode(wanted).decode(), str(owner)],
        stdin=subprocess.PIPE if owner else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if owner else subprocess.DEVNULL,
        cwd=_TOP,
        start_new_session=True,  # Ctrl-C is not meant for it
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if not line:
        process.wait()
        raise RigError(
            f"the process that keeps the rig ended with code {process.returncode}; see its output above"
        )
    report = msgspec.json.decode(line, type=Report)
    if report.error is not None:
        process.wait()
        raise RigError(report.error)
    return process, report


def check_machine() -> None:
    """Raises `RigError` where a rig cannot be."""
    if os.geteuid() != 0:
        raise RigError(
            "the rig needs root, for network namespaces and CPU quotas; run it with sudo or as root"
        )
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise RigError(f"the rig needs {' and '.join(missing)}; install the package iproute2")


class Standing(msgspec.Struct, frozen=True):
    """A rig that is up."""

    pid: int
    owner: int
    """The process it belongs to; 0 for one that `up` left standing."""
    settings: Settings
    node_file: str | None


def standing_rigs() -> list[Standing]:
    """All rigs that are up, whoever keeps them."""
    found = []
    for pid, argv in sorted(with_arguments("-m", f"{_PACKAGE}.keeper").items()):
        with contextlib.suppress(msgspec.DecodeError, ValueError, IndexError):
            found.append(
                Standing(pid, int(argv[-1]), msgspec.json.decode(argv[-2], type=Settings), _node_file(pid))
            )
    return found


def end_standing(rig: Standing) -> None:
    """End a rig that `up` left, and wait until it is gone."""
    handle = os.pidfd_open(rig.pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        _await_end(handle)
    finally:
        os.close(handle)


def _await_end(handle: int) -> None:
    if not select.select([handle], [], [], 15)[0]:
        signal.pidfd_send_signal(handle, signal.SIGKILL)


def _node_file(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path).startswith(f"/memfd:{NODE_NAME}"):
                return entry.path
    return None
