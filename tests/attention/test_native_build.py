"""Building the native library: once, safely, and with a way out."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch
from seesaw.attention.cpu import CpuAttention
from seesaw.attention.select import create_attention
from seesaw.native import build
from tests.attention.test_attention import CASES, TOLERANCE

LOAD = "from seesaw.native.build import load; lib = load(); print(lib is not None and lib._name)"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process state in which nothing has been loaded, with an empty cache."""
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.delenv("SEESAW_NATIVE", raising=False)
    monkeypatch.setenv("SEESAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        build._compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler here")


@pytest.mark.usefixtures("compiler")
def test_several_processes_build_at_once(fresh: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    children = [
        subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    answers = {child.communicate(timeout=120)[0].strip() for child in children}
    libraries = list(fresh.glob("*.so"))
    assert len(libraries) == 1 and answers == {str(libraries[0])}
    assert not [path for path in fresh.iterdir() if path.is_dir()]  # nothing half made is left
    written = libraries[0].stat().st_mtime_ns
    assert build.load() is build.load() is not None
    assert libraries[0].stat().st_mtime_ns == written


@pytest.mark.usefixtures("compiler")
def test_damaged_library_is_made_anew(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    library = fresh / f"{build._fingerprint(build._compiler())}.so"
    library.write_bytes(b"\x7fELF")
    assert build.build(fresh).seesaw_attend
    assert library.stat().st_size > 1000


def test_without_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert build.load() is None and build.load() is None
    assert len(caplog.records) == 1 and "no-such-compiler is not on the PATH" in caplog.text


def test_compiler_that_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert build.load() is None
    assert "false failed" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_cache_that_cannot_be_written(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.parent.write_text("a file where the cache folder should be")
    assert build.load() is None
    assert "cannot use the cache folder" in caplog.text


def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESAW_NATIVE", "0")
    assert build.load() is None
    assert not fresh.exists()


PORTABLE = [pytest.param("x86-64", marks=pytest.mark.slow), "x86-64-v3"]


def older(march: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CpuAttention:
    """The kernels as compiled for a processor that lacks what this one has."""
    if platform.machine() != "x86_64":
        pytest.skip("compiles for older x86 processors")
    flags = tuple(f"-march={march}" if flag == "-march=native" else flag for flag in build._FLAGS)
    monkeypatch.setattr(build, "_FLAG_SETS", (flags,))
    return CpuAttention(build.build(folder))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("march", PORTABLE)
def test_code_for_older_processors(march: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = older(march, fresh, monkeypatch)
    for name in ("mixed", "window", "head of 40", "one KV head, odd group"):
        for dtype in TOLERANCE:
            dataclasses.replace(CASES[name], dtype=dtype).check(backend)
    for dtype in TOLERANCE:
        check_conversions(backend, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    check_conversions(create_attention("cpu"), dtype)


def check_conversions(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """A token that sees only itself gets its own V back: every 16-bit number, and every kind of rounding."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = every[every.isfinite()].to(dtype)
    assert torch.equal(own_value(backend, numbers, dtype, dtype), numbers)
    patterns = torch.randint(0x38000000, 0x47000000, (1 << 15,), dtype=torch.int32)  # about 3e-5 to 3e4
    patterns[::2] &= ~0xFFF  # with ties between neighbours
    finer = patterns.view(torch.float32)
    assert torch.equal(own_value(backend, finer, torch.float32, dtype), finer.to(dtype))


def own_value(
    backend: AttentionBackend, numbers: Tensor, pool_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    v = numbers.view(-1, 1, 8)
    count = len(v)
    batch = AttentionBatch(
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        context_starts=torch.zeros(count, dtype=torch.int32),
        block_tables=torch.arange(count, dtype=torch.int32)[:, None].contiguous(),
        slot_mapping=torch.arange(count),
        max_query=1,
    )
    pool = torch.zeros((count, 2, 1, 1, 8), dtype=pool_dtype)
    zeros = torch.zeros_like(v)
    out = backend.attend(zeros.to(dtype), zeros, v, pool, batch, scale=1.0, window=None)
    return out.flatten()
