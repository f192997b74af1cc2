"""`seesaw run` without `--plan`: planned by the first rows where there is a profile, by rule where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from seesaw.cli.main import app
from seesaw.planning.profiles import save_profile
from tests.engine.small_node import CONFIG, SMALL, node
from tests.jobs.contract import read


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a profile would be found."""
    path = tmp_path / "profile.json"
    monkeypatch.setenv("SEESAW_PROFILE", str(path))
    return path


def run(folder: Path, *options: str) -> Result:
    """A job of 100 rows of 3 tokens each, with one bad row among the first."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rows = [
        {"id": str(i), "prompt_token_ids": [3 + (i + j) % 250 for j in range(60)], "max_tokens": 3}
        for i in range(100)
    ]
    rows[7]["max_tokens"] = -1
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(folder), "--input", str(folder / "in.jsonl"), "--ranks", "2"]
    for name, value in SMALL.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return CliRunner().invoke(app, ["run", *arguments, *options], catch_exceptions=False)


def test_a_profile_lets_the_planner_choose(tmp_path: Path, profile: Path) -> None:
    save_profile(profile, node())
    result = run(tmp_path)
    assert result.exit_code == 1, result.output
    assert "plan auto: P2, chunk 32 (predicted" in result.stderr
    assert "99 answered, 1 failed" in result.stdout
    answers = {line["custom_id"] for line in read(tmp_path / "in.output.jsonl")}
    assert answers == {str(i) for i in range(100)} - {"7"}


def test_without_one_the_rule_decides_and_says_so(tmp_path: Path, profile: Path) -> None:
    result = run(tmp_path, "--limit", "5")
    assert result.exit_code == 0, result.output
    assert f"plan auto: P2->T2 by rule, since there is no profile at {profile}" in result.stderr
    assert "`seesaw profile` lets the planner choose" in result.stderr


@pytest.mark.parametrize("options", [("--policy", "chunked"), ("--max-running", "3")])
def test_what_is_asked_for_is_kept(options: tuple[str, str], tmp_path: Path, profile: Path) -> None:
    save_profile(profile, node())
    result = run(tmp_path, *options)
    assert "99 answered" in result.stdout and "plan auto: P2, chunk 32" in result.stderr


def test_what_cannot_be_used_is_refused_before_any_row_is_read(tmp_path: Path, profile: Path) -> None:
    save_profile(profile, node())
    result = run(tmp_path, "--device-memory", "1KiB")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "device memory" in result.stderr
    assert not (tmp_path / "in.output.jsonl").exists()
