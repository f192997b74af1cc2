"""`seesaw devices`: what it says of a node."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from seesaw.cli.main import app
from seesaw.inventory import Inventory, SeenGpu, Taken

GIB = 1 << 30


def node(*gpus: SeenGpu, no_gpus: str = "", planner: str = "") -> Inventory:
    return Inventory(
        host={
            "processor": "EPYC",
            "extensions": "avx2",
            "cores": "16 of 16",
            "memory": "128.0 GiB",
            "kernel": "6",
        },
        free_memory=100 * GIB,
        shared_memory=64 * GIB,
        native=True,
        gpus=gpus,
        no_gpus=no_gpus,
        taken=Taken(
            device="cuda" if gpus else "cpu",
            ranks=len(gpus) or 1,
            device_memory=20 * GIB,
            host_kv=32 * GIB,
            planner=planner,
            no_planner="" if planner else "there is no profile",
        ),
    )


def said(monkeypatch: pytest.MonkeyPatch, found: Inventory, *arguments: str) -> str:
    monkeypatch.setattr("seesaw.inventory.take_inventory", lambda: found)
    result = CliRunner().invoke(app, ["devices", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SeenGpu(name="NVIDIA L4", memory=24 * GIB, free=22 * GIB, catalogue="L4")
    other = SeenGpu(name="Tesla T4", memory=16 * GIB, free=15 * GIB, catalogue=None)
    text = said(monkeypatch, node(known, other, planner="the catalogue's figures of L4"))
    assert "GPU 0         NVIDIA L4, 24.0 GiB, 22.0 GiB free; L4 of the catalogue" in text
    assert "GPU 1         Tesla T4, 16.0 GiB, 15.0 GiB free; not in the catalogue" in text
    assert "2 GPU ranks (--device, --ranks)" in text and "chosen by the catalogue's figures of L4" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_box_without(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, node(no_gpus="there is no NVIDIA driver here"))
    assert "GPUs          there is no NVIDIA driver here" in text
    assert "1 CPU rank (" in text and "by rule: there is no profile" in text


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(said(monkeypatch, node(no_gpus="none"), "--json"))
    assert found["taken"]["device_memory"] == 20 * GIB and found["free_memory"] == 100 * GIB
