"""Compiles the C++ sources of this folder once per machine and loads them with ctypes.

The library is cached as `<hash>.so` under `$SEESAW_CACHE/native` (default `~/.cache/seesaw/native`); the hash
covers the sources, the compiler and its flags, and the CPU, since the code is compiled for the CPU at hand.
Where it cannot be built, `load` returns None and the callers' pure-torch fallbacks serve. `SEESAW_NATIVE=0`
forces that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno")
# the first set that compiles is used; without OpenMP the kernels run on one thread
_FLAG_SETS = ((*_FLAGS, "-fopenmp"), _FLAGS)
_COMPILE_SECONDS = 120.0

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []


class BuildError(Exception):
    """The native library cannot be built or loaded here; the message says why."""


def load() -> ctypes.CDLL | None:
    """The native library, built if need be; None if it cannot be had (one warning is logged) or is off.

    The answer is kept for the life of the process. Several threads and processes may call at once: one
    compiles while the others wait.
    """
    if os.environ.get("SEESAW_NATIVE") == "0":
        return None
    with _lock:
        if not _loaded:
            _loaded.append(_build_or_warn())
        return _loaded[0]


def _build_or_warn() -> ctypes.CDLL | None:
    try:
        return build(cache_folder())
    except BuildError as error:
        logger.warning("native kernels are not available (%s); CPU ranks use slower torch code", error)
        return None


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    base = os.environ.get("SEESAW_CACHE")
    try:
        return (Path(base) if base else Path.home() / ".cache" / "seesaw") / "native"
    except RuntimeError as error:  # no home directory
        raise BuildError(f"{error} Set SEESAW_CACHE to a folder that can be written") from error


def build(folder: Path) -> ctypes.CDLL:
    """Load the library from `folder`, compiling it there first if it is missing. Raises `BuildError`."""
    compiler = _compiler()
    target = folder / f"{_fingerprint(compiler)}.so"
    try:
        if target.exists():
            with contextlib.suppress(OSError):  # damaged: compile it anew
                return ctypes.CDLL(str(target))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _file_lock(folder / f"{target.stem}.lock"):
            if not _loads(target):
                _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"cannot use the cache folder {folder}: {error}") from error


def _loads(target: Path) -> bool:
    try:
        ctypes.CDLL(str(target))
    except OSError:
        return False
    return True


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler: {wanted or 'g++'} is not on the PATH")


def _sources() -> list[Path]:
    return sorted(_FOLDER.glob("*.cpp"))


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in (*_sources(), *sorted(_FOLDER.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (repr(_FLAG_SETS), compiler, _run([compiler, "--version"]), _cpu()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


@cache
def _cpu() -> str:
    """Name and features of the CPU: what `-march=native` depends on."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
        wanted = ("model name", "flags", "Features", "CPU part")
        lines += [line for line in first.splitlines() if line.startswith(wanted)]
    return "\n".join(lines)


def _compile(compiler: str, target: Path) -> None:
    """Compile beside `target` and move the library into place: no half file is ever loaded."""
    logger.info("compiling the native kernels for this CPU, once")
    errors = []
    for flags in _FLAG_SETS:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}.") as folder:
            library = Path(folder) / "library.so"
            try:
                _link(compiler, flags, library)
            except BuildError as error:
                errors.append(str(error))
                continue
            if _loads(library):
                library.replace(target)
                return
            errors.append(f"the library made with {flags[-1]} does not load")
    raise BuildError("; ".join(errors))


def _link(compiler: str, flags: Sequence[str], library: Path) -> None:
    """Compile the sources, several at a time, and link them."""

    def compile_one(source: Path) -> str:
        made = library.with_name(f"{source.stem}.o")
        _run([compiler, *flags, "-c", "-o", str(made), str(source)])
        return str(made)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, _sources()))
    _run([compiler, *flags, "-shared", "-o", str(library), *objects])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(f"{command[0]} failed: {next((x for x in lines if 'error' in x), lines[0])}")
    return done.stdout


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock. Where the file system has none, several may compile at once, to no harm."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
