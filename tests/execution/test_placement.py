"""A worker goes to its place: control groups, namespace, cores; its ZeroMQ sockets come along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from seesaw.core.errors import StartupError
from seesaw.core.node import Place
from seesaw.execution.placement import enter

NEW_NAMESPACE = """
import ctypes, os, sys, threading
from seesaw.core.node import Place
from seesaw.execution.placement import enter

def new_namespace():
    # a thread of its own goes there and opens it, so that the main thread stays where it is
    opened = []
    def go():
        if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:
            sys.exit(77)
        opened.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if not opened:
        os._exit(77)
    return f"/proc/{os.getpid()}/fd/{opened[0]}"
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", NEW_NAMESPACE + code, *arguments]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=60)
    if process.returncode == 77:
        pytest.skip("making a network namespace needs root")
    assert process.returncode == 0, said


def run(code: str) -> None:
    finish(start(code))


def test_nothing_asked_changes_nothing() -> None:
    before = os.sched_getaffinity(0), os.readlink("/proc/self/ns/net")
    enter(Place())
    assert (os.sched_getaffinity(0), os.readlink("/proc/self/ns/net")) == before


def test_control_groups_are_told_the_process(tmp_path: Path) -> None:
    groups = [tmp_path / "cpu", tmp_path / "memory"]
    for group in groups:
        group.mkdir()
        (group / "cgroup.procs").touch()
    enter(Place(cgroups=[str(group) for group in groups]))
    assert [(group / "cgroup.procs").read_text() for group in groups] == [str(os.getpid())] * 2


def test_cores_hold_for_the_caller_and_later_threads() -> None:
    code = """
core = max(os.sched_getaffinity(0))
enter(Place(cores=[core]))
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
thread.start()
thread.join()
assert seen == [{core}] and os.sched_getaffinity(0) == {core}
"""
    run(code)


def test_the_namespace_holds_for_the_caller_and_later_threads() -> None:
    code = """
path, before = new_namespace(), os.readlink("/proc/self/ns/net")
enter(Place(netns=path))
there = os.stat(path).st_ino
seen = []
thread = threading.Thread(target=lambda: seen.append(os.stat("/proc/thread-self/ns/net").st_ino))
thread.start()
thread.join()
assert seen == [there] and os.stat("/proc/self/ns/net").st_ino == there
assert os.readlink("/proc/self/ns/net") != before
"""
    run(code)


def test_a_zeromq_socket_connected_before_goes_on_working() -> None:
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    name = f"ipc://@seesaw-test-placement-{os.getpid()}"
    pull.bind(f"{name}-up")
    push.bind(f"{name}-down")
    code = """
import zmq
context = zmq.Context()
push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
there = new_namespace()
push.connect(sys.argv[1] + "-up")
pull.connect(sys.argv[1] + "-down")
enter(Place(netns=there))
assert pull.poll(20000)
push.send(pull.recv() + os.readlink("/proc/self/ns/net").encode())
context.destroy(linger=20000)
"""
    process = start(code, name)
    try:
        if push.poll(20000, zmq.POLLOUT):
            push.send(b"from ")
        finish(process)
        assert pull.poll(20000)
        answer = pull.recv()
        assert answer.startswith(b"from net:")
        assert not answer.endswith(os.readlink("/proc/self/ns/net").encode())
    finally:
        process.kill()
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place(cgroups=["/nonesuch/rank0"]), "cannot join the control group /nonesuch/rank0: No such file"),
        (Place(netns="/nonesuch/ns"), "cannot enter the network namespace /nonesuch/ns: No such file"),
        (Place(netns=__file__), "cannot enter the network namespace .*: Invalid argument"),
        (Place(cores=[1 << 15]), r"cannot bind to the cores \[32768\].*may use"),
    ],
)
def test_what_cannot_be_is_said(place: Place, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        enter(place)


def test_a_directory_that_is_no_control_group_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot join"):
        enter(Place(cgroups=[str(tmp_path)]))
    assert list(tmp_path.iterdir()) == []
