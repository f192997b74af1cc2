"""Runs a command on a rig, passing signals on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from seesaw.core.node import Place
from seesaw.execution.fork_server import die_with_parent
from seesaw.execution.placement import enter

from .errors import RigError

NODE_VARIABLE = "SEESAW_NODE"
_WATCHED = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


def run_command(argv: Sequence[str], *, node_file: str, group: str | None) -> int:
    """Run `argv` with SEESAW_NODE set, in control group `group`; returns its exit code, 128 + n after signal n.

    Signals that reach this process alone are handed on; Ctrl-C at a terminal reaches the command by itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        process = _start(argv, {**os.environ, NODE_VARIABLE: node_file}, group, before)
        while process.poll() is None:
            info = signal.sigwaitinfo(_WATCHED)
            if (
                info.si_signo != signal.SIGCHLD and info.si_pid != 0
            ):  # 0: from the kernel, that is the terminal
                process.send_signal(info.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = process.returncode
    return 128 - code if code < 0 else code


def _start(
    argv: Sequence[str], environment: Mapping[str, str], group: str | None, mask: set[int]
) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        die_with_parent()
        enter(Place(cgroups=[group] if group else []))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(argv, env=environment, preexec_fn=prepare)
    except OSError as error:
        raise RigError(f"cannot run {argv[0]}: {error.strerror}") from None
    except subprocess.SubprocessError:
        raise RigError(f"cannot run {argv[0]}: its control group {group} is gone") from None
