"""Whole sessions of processes: who belongs to one, stopping, continuing and ending it. Linux, standard library only.

Run as a program (`python sessions.py`) this is a guard: it reads `add SID` and `drop SID` lines from standard input
and, when that ends, kills what is left of the sessions added. So a bench that is killed leaves no process behind,
not even stopped ones, which no signal to a parent or broken pipe would wake.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

_STATE, _PARENT, _SESSION, _USER, _SYSTEM = 0, 1, 3, 11, 12
"""Places of fields in /proc/PID/stat behind the name."""


def members(session: int) -> dict[int, str]:
    """State (`R`, `S`, `T`, …) of each process of a session and of their descendants, by process id.

    Zombies do not count.
    """
    processes = _processes()
    found = {pid for pid, fields in processes.items() if int(fields[_SESSION]) == session}
    grown = True
    while grown:
        children = {pid for pid, fields in processes.items() if int(fields[_PARENT]) in found} - found
        found |= children
        grown = bool(children)
    return {pid: processes[pid][_STATE] for pid in found if processes[pid][_STATE] not in "ZX"}


def processor_seconds(session: int) -> float:
    """Processor time that the living members of a session have used so far, in seconds."""
    processes = _processes()
    return sum(
        int(processes[pid][_USER]) + int(processes[pid][_SYSTEM])
        for pid in members(session)
        if pid in processes
    ) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """Processor time that the machine's cores have spent on anything since it started, in seconds."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, *interrupts = (int(value) for value in file.readline().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _processes() -> dict[int, list[str]]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as file:
                found[int(name)] = file.read().rpartition(")")[2].split()
    return found


def stop(session: int, timeout: float = 10.0) -> None:
    """Stop every process of a session and wait until all stand still. Raises `TimeoutError`."""
    _until_all(session, signal.SIGSTOP, "T", timeout)


def resume(session: int) -> None:
    """Let a stopped session go on."""
    for pid in members(session):
        _send(pid, signal.SIGCONT)


def kill(session: int, timeout: float = 10.0) -> None:
    """Kill every process of a session and wait until all are gone. Raises `TimeoutError`."""
    _until_all(session, signal.SIGKILL, "", timeout)


def _until_all(session: int, number: signal.Signals, state: str, timeout: float) -> None:
    """Send a signal to every member until all are in `state`; with none, until all are gone."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while left := [pid for pid, now in members(session).items() if now != state]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} of session {session} do not answer {number.name}")
        for pid in left:
            _send(pid, number)
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _guard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin:
        word, _, session = line.partition(" ")
        (sessions.add if word == "add" else sessions.discard)(int(session))
    for session in sessions:
        kill(session)


if __name__ == "__main__":
    _guard()
