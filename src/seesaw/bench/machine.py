"""What a record says of the machine, the software and the command, so that a figure can be judged and repeated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

import seesaw
from seesaw.core.units import format_bytes

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_fp16", "amx_int8")
_PACKAGES = ("torch", "numpy")


def machine() -> dict[str, str]:
    """Processor, its vector extensions, cores, memory, kernel."""
    model, flags = _processor(Path("/proc/cpuinfo"))
    return {
        "processor": model,
        "extensions": " ".join(flag for flag in _FLAGS if flag in flags) or "none of note",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": format_bytes(psutil.virtual_memory().total),
        "kernel": platform.release(),
    }


def _processor(cpuinfo: Path) -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def versions() -> dict[str, str]:
    """Of Seesaw, with its commit, of Python and of what decides speed."""
    found = {"seesaw": f"{seesaw.__version__} ({commit()})", "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of the source tree, and whether files differ from it; `no source tree` for an installed package."""
    folder = Path(seesaw.__file__).parent
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "no source tree"
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"commit {head}, with changes" if changed else f"commit {head}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line(arguments: Sequence[str]) -> str:
    """`seesaw` with these arguments, quoted for a shell."""
    return shlex.join(["seesaw", *arguments])
