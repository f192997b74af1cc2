"""Which operators serve which device."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from seesaw.core.errors import ConfigError
from seesaw.native import build
from seesaw.ops.select import create_operators
from seesaw.ops.torch_ops import TorchOperators


def test_the_best_operators_of_a_device() -> None:
    served = "torch" if build.load() is None else "cpu"
    assert create_operators("cpu").name == served
    assert create_operators("cpu", "cpu", dtype=torch.bfloat16).name == served
    for device in ("cpu", "cuda:1"):
        assert type(create_operators(device, "torch")) is TorchOperators


def test_a_cuda_device_gets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("tests.triton_interpreter")  # skips without Triton
    monkeypatch.setenv("CC", "cc")
    for device, name in (("cuda", None), ("cuda:1", "triton")):
        assert create_operators(device, name, dtype=torch.bfloat16).name == "triton"


def test_types_without_kernels_are_served_by_torch() -> None:
    for device in ("cpu", "cuda"):
        assert type(create_operators(device, dtype=torch.float64)) is TorchOperators


def test_torch_serves_cuda_where_triton_cannot_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert type(create_operators("cuda")) is TorchOperators
    assert "no C compiler" in caplog.text and "CC" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(create_operators("cuda")) is TorchOperators
    assert "pip install 'seesaw-llm[cuda]'" in caplog.text
    with pytest.raises(ConfigError, match="'triton' cannot run: Triton is not installed"):
        create_operators("cuda", "triton")


def test_torch_serves_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESAW_NATIVE", "0")
    assert type(create_operators("cpu")) is TorchOperators
    assert type(create_operators("cpu", "cpu")) is TorchOperators


def test_unknown_names_and_devices_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown name 'mkl' for device 'cpu'; use one of \('cpu', 'torch'\)"
    ):
        create_operators("cpu", "mkl")
    with pytest.raises(
        ConfigError, match=r"unknown name 'cpu' for device 'cuda:0'; use one of \('triton', 'torch'\)"
    ):
        create_operators("cuda:0", "cpu")
    with pytest.raises(ConfigError, match="none for device 'tpu'"):
        create_operators("tpu")


def test_both_kinds_compute_the_same_matrix_product() -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(7, 40), torch.randn(7)
    wanted = x @ weight.T + bias
    for operators in (create_operators("cpu"), TorchOperators()):
        out = torch.empty(3, 7)
        assert torch.allclose(operators.linear(x, weight, bias), wanted, atol=1e-5)
        assert operators.linear(x, weight, bias, out=out) is out and torch.allclose(out, wanted, atol=1e-5)
        operators.linear(x, weight, out=out)
        assert torch.allclose(out, wanted - bias, atol=1e-5)
