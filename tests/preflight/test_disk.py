"""Disk: free space against what is expected, and whether a folder can be written at all."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from seesaw.core.errors import ConfigError
from seesaw.preflight.disk import JOURNAL_ROW_BYTES, check_space, check_writable
from seesaw.preflight.expected import LEAST_BYTES, LINE_BYTES, TOKEN_BYTES, Expected, expect, input_bytes
from seesaw.preflight.findings import Finding, settle
from seesaw.preflight.gate import PAYS_FROM_BYTES, check_job_files, choose_mode

GIB = 1 << 30


@dataclass(frozen=True)
class Disk:
    """Stands for `os.statvfs_result`."""

    f_bavail: int
    f_frsize: int = 4096

    def __call__(self, path: Path) -> Disk:
        return self


def space(free: int, *, rows: int = 1 << 20, least: float = 400, most: float = 4000, written: int = 0) -> str:
    """Severity of what is found."""
    path, disk = Path("/data/out.jsonl"), Disk(free // 4096)
    finding = check_space(path, rows=rows, least=least, most=most, written=written, statvfs=disk)
    return "" if finding is None else finding.severity


def test_free_space_against_expected() -> None:
    assert space(5 * GIB) == ""
    assert space(3 * GIB) == "warning"
    assert space(GIB // 4) == "error"
    exact = (1 << 20) * (400 + JOURNAL_ROW_BYTES)
    assert (space(exact), space(exact - 4096)) == ("warning", "error")
    assert space(GIB // 4, rows=100) == ""
    assert space(GIB // 4, written=(1 << 20) * 300) == "warning"  # of a job that goes on


def test_what_is_said_of_space() -> None:
    finding = check_space(
        Path("/data/out.jsonl"), rows=2_000_000, least=400, most=4000, statvfs=Disk((GIB // 2) // 4096)
    )
    assert str(finding) == (
        "disk: 2,000,000 rows take at least 854.5 MiB at /data/out.jsonl, and /data has 512.0 MiB free; "
        "free some space, or write elsewhere with --output"
    )


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_writable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    missing = check_writable(tmp_path / "none")
    assert missing is not None and "No such file or directory" in missing.what

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    finding = check_writable(tmp_path)
    assert finding is not None and finding.severity == "error"
    assert f"nothing can be written to {tmp_path} (No space left on device)" in finding.what
    assert list(tmp_path.iterdir()) == []


def rows(path: Path, *bodies: dict[str, object], times: int = 1) -> Path:
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies) * times)
    return path


def test_expectations_follow_the_first_rows(tmp_path: Path) -> None:
    plain = {"prompt": "x" * 80, "max_tokens": 100}
    batch = {"custom_id": "a", "body": {"messages": [], "max_completion_tokens": 300, "n": 2}}
    found = expect([rows(tmp_path / "in.jsonl", plain, batch, times=5000)], None)
    assert found is not None
    assert found.rows == pytest.approx(10_000, rel=0.01)
    assert found.least == LEAST_BYTES < LINE_BYTES
    assert found.most == pytest.approx(LINE_BYTES + (100 + 600) / 2 * TOKEN_BYTES, rel=0.01)
    limited = expect([tmp_path / "in.jsonl"], 7)
    assert limited is not None and limited.rows == 7


def test_other_formats_take_less() -> None:
    expected = Expected(rows=10, least=100, most=1000)
    assert expected.as_written(Path("o.jsonl")) == expected
    assert expected.as_written(Path("o.csv")) == Expected(rows=10, least=0, most=1000)
    assert expected.as_written(Path("o.jsonl.zst")) == Expected(rows=10, least=0, most=200)


def test_rows_that_cannot_be_read_get_no_text(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'not json\n[1]\n{"body": 3}\n{"prompt": "a", "max_tokens": "many"}\n\n\xff\n')
    with path.open("ab") as file:
        file.write(b"[" * 50_000 + b"\n")  # deeper than any parser goes
    found = expect([path], None)
    assert found is not None and found.rows == 6
    assert found.most == pytest.approx(LINE_BYTES + 16 * TOKEN_BYTES / 6)


def test_inputs_that_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 1000)
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe")
    assert expect([tmp_path / "a.jsonl.gz"], None) is None
    assert expect([tmp_path / "empty.jsonl"], None) is None
    assert expect([tmp_path / "pipe"], None) is None
    assert expect([tmp_path / "missing"], None) is None
    assert input_bytes([tmp_path / "a.jsonl.gz", tmp_path / "empty.jsonl"]) == 5000
    assert input_bytes([tmp_path / "pipe"]) is None


def test_when_a_check_of_communication_pays(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * (PAYS_FROM_BYTES - 1))
    large.write_bytes(b"x" * PAYS_FROM_BYTES)

    def mode(asked: str, path: Path, ranks: int = 2, limit: int | None = None) -> str:
        return choose_mode(asked, ranks=ranks, inputs=[path], limit=limit)

    assert (mode("auto", small), mode("auto", large), mode("auto", tmp_path / "pipe")) == (
        "limits",
        "on",
        "on",
    )
    assert (mode("auto", large, ranks=1), mode("auto", large, limit=10)) == ("limits", "limits")
    assert (mode("on", small), mode("on", small, ranks=1), mode("off", large)) == ("on", "limits", "off")


def test_findings_are_settled(caplog: pytest.LogCaptureFixture) -> None:
    settle([])
    findings = [Finding("warning", "w", "do a"), Finding("error", "e", "do b"), Finding("error", "f", "do c")]
    with caplog.at_level("INFO", logger="seesaw"), pytest.raises(ConfigError, match=r"^preflight: e; do b$"):
        settle(findings)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "preflight: w; do a"),
        ("ERROR", "preflight: f; do c"),
    ]


def test_a_job_of_this_disk(tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", {"prompt": "a"})
    check_job_files([source], tmp_path / "o", tmp_path / "e", limit=None)
    with pytest.raises(ConfigError, match=r"nothing can be written to .*none \(No such file"):
        check_job_files([source], tmp_path / "o", tmp_path / "none" / "e", limit=None)
