"""Copies of a CPU rank, on their thread: order, overlap, errors that are never lost, and a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import seesaw
from seesaw.device.cpu import CpuDevice
from seesaw.kv.copy_engine import CopyEngine

WAIT = 10.0


def test_runs_in_order_beside_the_caller() -> None:
    device, gate, seen = CpuDevice(), threading.Event(), list[object]()
    engine = CopyEngine(device)

    def first() -> int:
        assert gate.wait(WAIT)
        seen.append("first")
        return 10

    def second() -> int:
        seen.append("second")
        return 20

    def done(size: int, seconds: float) -> None:
        seen.append((size, seconds >= 0))

    engine.to_host(first, done)
    engine.to_host(second, done)
    assert seen == []  # both are submitted, and the caller goes on
    gate.set()
    engine.fence()
    assert seen == ["first", (10, True), "second", (20, True)]
    device.close()


def test_a_fence_waits_for_what_was_submitted_and_may_be_repeated() -> None:
    device, done = CpuDevice(), list[int]()
    engine = CopyEngine(device)
    engine.fence()
    for round in range(1, 4):
        for index in range(50):
            engine.to_host(partial(int, index), lambda size, _: done.append(size))
        engine.fence()
        assert done == list(range(50)) * round
    device.close()
    device.close()


class DiskOnFireError(Exception):
    pass


def fail() -> int:
    raise DiskOnFireError("at block 7")


def fail_when_done(size: int, seconds: float) -> None:
    raise DiskOnFireError("at the end")


@pytest.mark.parametrize("in_copy", [True, False])
def test_error_stops_the_engine_and_comes_back_every_time(in_copy: bool) -> None:
    device, ran = CpuDevice(), list[str]()
    engine = CopyEngine(device)
    if in_copy:
        engine.to_host(fail, lambda *_: ran.append("done"))
    else:
        engine.to_host(lambda: 1, fail_when_done)
    with pytest.raises(DiskOnFireError):
        engine.fence()
    with pytest.raises(DiskOnFireError):
        engine.to_host(lambda: len(ran), lambda *_: ran.append("later"))
    with pytest.raises(DiskOnFireError):
        engine.fence()
    device.close()  # told already
    assert ran == []


def test_copies_queued_behind_an_error_are_dropped() -> None:
    device, gate, ran = CpuDevice(), threading.Event(), list[str]()
    engine = CopyEngine(device)

    def fail_late() -> int:
        assert gate.wait(WAIT)
        return fail()

    engine.to_host(fail_late)
    engine.to_host(lambda: len(ran), lambda *_: ran.append("later"))
    gate.set()
    with pytest.raises(DiskOnFireError):
        engine.fence()
    assert ran == []


def test_close_tells_an_error_nobody_saw() -> None:
    device = CpuDevice()
    CopyEngine(device).to_host(fail)
    with pytest.raises(DiskOnFireError):
        device.close()
    device.close()


LEAVE = """
import sys, time
from seesaw.device.cpu import CpuDevice
from seesaw.kv.copy_engine import CopyEngine
engine = CopyEngine(CpuDevice())
for index in range(3):
    engine.to_host(lambda: time.sleep(0.05) or 1, lambda size, seconds: sys.stdout.write("copied\\n"))
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1)])
def test_process_leaves_without_close(end: str, status: int) -> None:
    source = str(Path(seesaw.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", LEAVE.format(end=end)],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == status, child.stderr
    assert child.stdout == "copied\n" * 3
    assert "seesaw-copies" not in child.stderr
