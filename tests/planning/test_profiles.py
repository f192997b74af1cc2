"""Profiles as files: what is written is read again, and what is wrong is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import TypeCurves
from seesaw.planning.profiles import default_path, load_profile, read_profile, save_profile
from tests.planning.machines import FLAT, hardware

CURVES = TypeCurves(product=FLAT, prefill_attention=FLAT, decode_attention=FLAT, token_of_kv=1e-9)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = hardware(by_type={"bfloat16": CURVES}, activation_bandwidth=5e9, sources={"send": "measured"})
    path = tmp_path / "new" / "profile.json"
    save_profile(path, spec)
    assert load_profile(path) == spec
    assert read_profile(path).machine and len(read_profile(path).date) == 10
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_types_without_curves_of_their_own_have_the_common_ones() -> None:
    spec = hardware(by_type={"bfloat16": CURVES}, token_of_query=3e-9)
    assert spec.curves("bfloat16") is CURVES
    assert spec.curves("float32").token_of_query == 3e-9
    assert spec.curves("float32").product is spec.product


def test_a_missing_profile_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; `seesaw profile` writes one"):
        load_profile(tmp_path / "profile.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "date": "2026-01-01", "machine": "a", "hardware": {"name": "b"}}',
        '{"version": "1"}',
    ],
)
def test_a_malformed_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is not a profile: .*run `seesaw profile` again"):
        load_profile(path)


def test_a_curve_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(path, hardware())
    document = json.loads(path.read_text())
    document["hardware"]["send"]["values"][0] = -1.0
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is not a profile: a curve's sizes must be positive"):
        load_profile(path)


def test_a_profile_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"version": 7, "hardware": {"something": "else"}}')
    with pytest.raises(ConfigError, match="has version 7, this Seesaw reads 1"):
        load_profile(path)


def test_a_profile_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(tmp_path / "file" / "profile.json", hardware())


def test_the_default_path_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEESAW_PROFILE", raising=False)
    monkeypatch.setenv("SEESAW_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "profile.json"
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "mine.json"))
    assert default_path() == tmp_path / "mine.json"
