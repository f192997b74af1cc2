"""What all tests need of the process that runs them."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest

from seesaw.native import build


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would all that the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["SEESAW_PROFILE"] = os.devnull + "/none"  # what this machine was measured at decides no test
    os.environ["SEESAW_DEVICE"] = "cpu"  # tests that want a GPU say so
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports a module of kernels


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The native library, where there is one."""
    found = build.load()
    if found is None:
        pytest.skip("no native library here")
    return found
