"""Metrics over HTTP: names, states, a port that is taken."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from seesaw.core.errors import ConfigError
from seesaw.recording.recorder import Counts
from seesaw.report.metrics import MetricsServer
from tests.jobs.echo_engine import EchoEngine


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0)
    yield server
    server.close()


def scrape(server: MetricsServer) -> dict[str, dict[tuple[str, ...], float]]:
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_before_the_engine_is_up_it_is_starting(server: MetricsServer) -> None:
    found = scrape(server)
    assert list(found) == ["seesaw_phase"]
    assert found["seesaw_phase"]["starting",] == 1


def test_all_that_is_known_is_told(server: MetricsServer) -> None:
    server.watch(EchoEngine().stats, lambda: Counts(answered=5, failed=2))
    found = scrape(server)
    assert found["seesaw_rows_total"] == {("answered",): 5, ("failed",): 2}
    assert "seesaw_input_rows" not in found
    assert found["seesaw_sequences"] == {("waiting",): 0, ("running",): 0}
    assert found["seesaw_phase"] == {
        (name,): float(name == "decode")
        for name in ("starting", "idle", "prefill", "decode", "mixed", "transition")
    }
    assert found["seesaw_rank_wait_seconds_total"] == {("prefill",): 0.5, ("decode",): 1.0}
    assert found["seesaw_transitions_total"] == {(): 1}
    assert found["seesaw_transition_bytes_total"] == {(): 3 << 20}
    assert found["seesaw_preemptions_total"] == {("swapped",): 4, ("recomputed",): 0}
    assert found["seesaw_swapped_bytes_total"] == {("out",): 1 << 20, ("in",): 1 << 20}
    assert found["seesaw_host_kv_budget_bytes"] == {(): 2 << 20}
    assert found["seesaw_rank_losses_total"] == {(): 0}


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as raised:
            MetricsServer("127.0.0.1", port)
    assert str(raised.value) == (
        f"--metrics-port {port}: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port or "
        "--metrics-host"
    )


def test_a_host_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no.such.host.invalid:0: "):
        MetricsServer("no.such.host.invalid", 0)
