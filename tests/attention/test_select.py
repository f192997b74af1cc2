"""Which backend is chosen on CUDA devices, what is said of it, and how whole prompts are handed to torch."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch

from seesaw.attention import select
from seesaw.attention.select import create_attention
from seesaw.attention.whole_prompts import by_operator, by_varlen_attn, find_whole_prompts
from seesaw.core.errors import ConfigError
from tests import triton_interpreter  # noqa: F401  (before kernels are imported)
from tests.attention import flashinfer_double

FIND_SPEC = importlib.util.find_spec


class Box:
    """A machine with a GPU, as far as the choice of a backend can tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = (8, 9)
        self.installed = {"triton"}
        self.broken: set[str] = set()
        monkeypatch.setattr(select, "_examine", lambda device: (self.capability, 128))
        monkeypatch.setattr(importlib.util, "find_spec", self._find_spec)
        monkeypatch.setattr("seesaw.attention.trial.try_backend", self._try)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
        monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_double)

    def _find_spec(self, name: str, package: str | None = None) -> ModuleSpec | None:
        if name in ("flashinfer", "triton"):
            return ModuleSpec(name, None) if name in self.installed else None
        return FIND_SPEC(name, package)

    def _try(self, backend: Any, *_: object) -> None:
        if backend.name in self.broken:
            raise RuntimeError(f"no kernel image\nfor {backend.name}")


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Box:
    caplog.set_level(logging.INFO, logger="seesaw.attention.select")
    return Box(monkeypatch)


def test_the_best_that_is_installed(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    assert create_attention("cuda:0", head_dim=128, dtype=torch.bfloat16).name == "triton"
    assert "Triton kernels" in caplog.text and "not flashinfer: it is not installed" in caplog.text
    box.installed.add("flashinfer")
    assert create_attention("cuda:0", head_dim=128, dtype=torch.bfloat16).name == "flashinfer"
    assert create_attention("cuda:0", "triton", head_dim=128).name == "triton"
    assert "asked for by name" in caplog.text
    box.installed.clear()
    caplog.clear()
    assert create_attention("cuda:0").name == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not triton: Triton is not installed" in caplog.text


def test_what_flashinfer_lacks_falls_to_triton(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    box.installed.add("flashinfer")
    assert create_attention("cuda", head_dim=128, dtype=torch.float32).name == "triton"
    assert "bfloat16 and float16, not float32" in caplog.text
    assert create_attention("cuda", head_dim=80, dtype=torch.bfloat16).name == "triton"
    assert "head_dim of 64, 128 or 256, not 80" in caplog.text
    box.broken.add("flashinfer")
    assert create_attention("cuda", head_dim=128, dtype=torch.bfloat16).name == "triton"
    assert "failed when tried: RuntimeError: no kernel image" in caplog.text


def test_old_devices_and_broken_compilers(
    box: Box, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.capability = (7, 5)
    assert create_attention("cuda").name == "torch"
    assert "compute capability 8.0, this device has 7.5" in caplog.text
    box.capability = (9, 0)
    box.broken.add("triton")
    assert create_attention("cuda").name == "torch"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert create_attention("cuda").name == "torch"
    assert "no C compiler" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flash",
            r"unknown backend 'flash' for device 'cuda:1'; use one of \('flashinfer', 'triton', 'torch'\)",
        ),
        ("cpu", "unknown backend 'cpu' for device 'cuda:1'"),
        ("flashinfer", "'flashinfer' cannot serve 'cuda:1': it is not installed .* use 'triton' or 'torch'"),
    ],
)
def test_names_that_cannot_be_used(name: str, message: str, box: Box) -> None:
    with pytest.raises(ConfigError, match=message):
        create_attention("cuda:1", name)


def test_named_backends_that_fail_when_tried(box: Box) -> None:
    box.broken.add("triton")
    with pytest.raises(ConfigError, match="'triton' cannot serve 'cuda': its kernels failed when tried"):
        create_attention("cuda", "triton")
    with pytest.raises(ConfigError, match="float32, bfloat16 and float16, not float64"):
        create_attention("cuda", "triton", dtype=torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:1' cannot be used"):
        create_attention("cuda:1", "triton")


@pytest.mark.parametrize("window", [None, 7])
def test_whole_prompts_by_the_public_function(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fits the function's signature, and says causal, scale, window and grouped heads."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    if "enable_gqa" not in signature.parameters:
        assert by_varlen_attn() is None
        pytest.skip("this torch's function lacks grouped heads")
    seen: list[dict[str, Any]] = []

    def varlen_attn(*values: Any, **options: Any) -> torch.Tensor:
        seen.append(signature.bind(*values, **options).arguments)
        return values[0]

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k, starts = torch.zeros(5, 4, 64), torch.zeros(5, 2, 64), torch.tensor([0, 3, 5], dtype=torch.int32)
    attend = by_varlen_attn()
    assert attend is not None and attend(q, k, k, starts, 3, 0.5, window) is q
    (call,) = seen
    assert call["cu_seq_q"] is call["cu_seq_k"] is starts and call["max_q"] == call["max_k"] == 3
    assert call["scale"] == 0.5 and call["enable_gqa"] and call["window_size"] == (6 if window else -1, 0)


@pytest.mark.parametrize("window", [None, 7])
def test_whole_prompts_by_the_operator(window: int | None) -> None:
    """On the device that knows shapes alone: the operator takes the call, grouped heads included."""
    q, k = (torch.empty(5, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    attend = by_operator()
    assert attend is not None
    assert attend(q, k, k, starts, 3, 0.5, window).shape == q.shape


def test_heads_that_flash_attention_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not 36" in find_whole_prompts(36)  # type: ignore[operator]
    assert "not 512" in find_whole_prompts(512)  # type: ignore[operator]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert callable(find_whole_prompts(64)) and callable(find_whole_prompts(None))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "without flash attention" in find_whole_prompts(64)  # type: ignore[operator]
