"""A small model, and profiles of the node it runs on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seesaw.planning.profiles import save_profile
from tests.engine.small_node import CONFIG, node


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


def write_model(folder: Path) -> None:
    """The small model, of random weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a profile of this machine the one that is found."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "profile.json"
        save_profile(path, node(**changes))
        monkeypatch.setenv("SEESAW_PROFILE", str(path))
        return path

    return write


@pytest.fixture(autouse=True)
def no_profile(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine may have measured has no say here."""
    caplog.set_level(logging.INFO, logger="seesaw")
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "none.json"))
