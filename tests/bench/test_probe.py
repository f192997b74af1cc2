from __future__ import annotations

from pathlib import Path

import pytest

from seesaw.bench import probe
from seesaw.bench.process import Guard
from seesaw.bench.shapes import model_directory
from seesaw.core.node import Place
from seesaw.models.hf_config import load_spec


def test_the_cores_are_measured_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ROWS", 8)
    monkeypatch.setattr(probe, "SECONDS", 0.01)
    monkeypatch.setattr(probe, "ARRAY_BYTES", 1 << 20)
    spec = load_spec(str(model_directory("tiny", tmp_path / "model")))
    with Guard() as guard:
        found = probe.measure(spec, [Place(cores=[0])] * 2, ["float32"], guard=guard, folder=tmp_path)
    assert found.ranks == 2
    assert "torch float32" in found.products
    assert set(found.sizes["torch float32"]) >= {"256x512"}
    assert min(found.read, found.read_alone, found.copy, found.copy_alone) > 0
    assert found.rates("float32").flops == max(found.products.values()) > 0
    assert found.rates("float32").bandwidth == found.read
