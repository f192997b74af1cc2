"""Whether kernels in Triton can run in this environment. Asked before a module of kernels is imported."""

from __future__ import annotations

import importlib.util
import os
import shutil


def missing_for_triton() -> str | None:
    """What Triton lacks here and how to get it, as a clause; None if it lacks nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install 'seesaw-llm[cuda]'` installs it"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return (
            "Triton finds no C compiler, which it builds its launchers with; install gcc, or name one in CC"
        )
    return None
