"""The trace file: what Perfetto needs of it, also when it ends too early."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest

from seesaw.core.errors import ConfigError
from seesaw.core.events import COMPUTE, CONTROL, COPIES, SCHEDULER, Event
from seesaw.recording.trace import TraceWriter, check_trace

EVENTS = [
    Event("decode", 1, COMPUTE, 5.0, 0.5, tokens=7, args={"id": 3}),
    Event("swap-in", 1, COPIES, 5.0, 0.25, bytes=1 << 30),
    Event("schedule", CONTROL, SCHEDULER, 5.0, 0.001),
]


def written(path: Path) -> list[dict[str, Any]]:
    writer = TraceWriter(path)
    writer.add(EVENTS)
    writer.counters({"running": 3})
    writer.close()
    writer.close()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: list[dict[str, Any]] = json.loads(data)
    return found


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_every_lane_is_a_row_of_its_own(name: str, tmp_path: Path) -> None:
    events = written(tmp_path / name)
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(rows.values()) == ["phases", "rank 1", "rank 1 copies", "scheduler"]
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    assert {name: rows[span["tid"]] for name, span in spans.items()} == {
        "decode": "rank 1",
        "swap-in": "rank 1 copies",
        "schedule": "scheduler",
    }
    assert spans["decode"]["dur"] == 5e5
    assert spans["decode"]["args"] == {"tokens": 7, "id": 3}
    assert spans["swap-in"]["args"] == {"bytes": 1 << 30, "GB/s": 4.295}
    (counter,) = [e for e in events if e["ph"] == "C"]
    assert (counter["name"], counter["args"]) == ("running", {"value": 3})


def test_a_trace_that_ends_anywhere_can_be_read(tmp_path: Path) -> None:
    """Readers of the array format add the bracket that is missing and drop what is cut off."""
    written(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    for line in range(2, text.count("\n")):
        cut = "\n".join(text.split("\n")[:line])
        assert len(json.loads(cut.rstrip().rstrip(",") + "]")) == line - 1


def test_what_was_added_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.json.gz")
    for _ in range(3000):
        writer.add(EVENTS)
    cut = zlib.decompressobj(wbits=31)  # of gzip
    found = cut.decompress((tmp_path / "t.json.gz").read_bytes())
    assert not cut.eof and found.count(b"decode") > 1000
    writer.close()


def test_a_full_disk_ends_the_trace_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    writer = TraceWriter("/dev/full")
    with caplog.at_level(logging.WARNING):
        for _ in range(3000):
            writer.add(EVENTS)
        writer.close()
    (record,) = caplog.records
    assert "/dev/full: ends here" in record.getMessage()


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace .*/nowhere/t.json: cannot be written: No such file"):
        check_trace(tmp_path / "nowhere" / "t.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        check_trace(tmp_path)
    check_trace(tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
