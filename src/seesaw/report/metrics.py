"""Prometheus metrics of a running job, over HTTP. Everything is read when it is asked for; nothing is kept.

prometheus_client is imported where a server is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from seesaw.core.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

    from seesaw.core.stats import EngineStats
    from seesaw.recording.recorder import Counts

PHASES = ("starting", "idle", "prefill", "decode", "mixed", "transition")
"""Values of `seesaw_phase{phase=…}`, of which one is 1."""


class MetricsServer:
    """Serves `/metrics` from a thread of its own until it is closed."""

    def __init__(self, host: str, port: int) -> None:
        """Listens on `host`:`port`; 0 takes any free port. Raises `ConfigError` if that cannot be had."""
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        self._collector = _Collector()
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--metrics-port {port}: cannot listen on {host}:{port}: {why}; choose another port or --metrics-host"
            ) from None
        registry.register(self._collector)
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def watch(self, stats: Callable[[], EngineStats], counts: Callable[[], Counts]) -> None:
        """Tell of this engine and this job from now on."""
        self._collector.sources = stats, counts

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    """What Prometheus asks at every scrape."""

    def __init__(self) -> None:
        self.sources: tuple[Callable[[], EngineStats], Callable[[], Counts]] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.sources is None:
            yield _gauge("phase", "What the ranks are doing", _one_hot("starting"), label="phase")
            return
        stats, counts = self.sources[0](), self.sources[1]()
        yield from _rows(stats, counts)
        yield from _work(stats)
        yield from _memory(stats)


def _rows(stats: EngineStats, counts: Counts) -> Iterator[Metric]:
    states = {"answered": counts.answered, "failed": counts.failed}
    yield _counter("rows", "Rows that have their line, by state", states, label="state")
    if counts.total is not None:
        yield _gauge("input_rows", "Rows of the job's input", counts.total)
    requests = {"waiting": stats.requests_waiting, "running": stats.requests_running}
    yield _gauge("sequences", "Sequences that the engine has, by state", requests, label="state")
    yield _counter("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens_fed)
    yield _counter("output_tokens", "Tokens generated", stats.tokens_sampled)


def _work(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("phase", "What the ranks are doing", _one_hot(stats.phase), label="phase")
    yield _gauge("plan_info", "The plan that runs", {stats.plan: 1}, label="plan")
    by_phase: dict[str, tuple[str, Mapping[str, float]]] = {
        "phase_seconds": ("Time by what the ranks were doing", stats.wall_seconds),
        "rank_wait_seconds": ("Time that the control process waited for the ranks", stats.seconds_per_phase),
        "control_seconds": ("Processor time of the control process's loop", stats.host_seconds),
        "forwards": ("Micro-batches that left the last stage", stats.steps),
        "forward_tokens": ("Tokens fed to them", stats.phase_tokens),
    }
    for name, (text, values) in by_phase.items():
        yield _counter(name, f"{text}, by phase", values, label="phase")
    records = stats.transitions
    yield _counter("transitions", "Changes of layout", len(records))
    yield _counter("transition_bytes", "Bytes of weights fetched by them", sum(r.bytes for r in records))
    yield _counter("transition_seconds", "Time that they took", sum(r.seconds for r in records))
    kinds = {"swapped": stats.preemptions_swapped, "recomputed": stats.preemptions_recomputed}
    yield _counter("preemptions", "Sequences that gave up their place, by kind", kinds, label="kind")
    yield _counter("rank_losses", "Ranks lost", sum(len(loss.ranks) for loss in stats.rank_losses))


def _memory(stats: EngineStats) -> Iterator[Metric]:
    moved = {"out": stats.swapped_out_bytes, "in": stats.swapped_in_bytes}
    yield _counter("swapped_bytes", "KV copied to the host buffer and back", moved, label="direction")
    yield _gauge("host_kv_used_bytes", "Host buffer in use", stats.host_kv_used_bytes)
    yield _gauge("host_kv_budget_bytes", "Size of the host buffer", stats.host_kv_budget_bytes)
    yield _gauge("device_kv_used_bytes", "KV pools of all ranks in use", stats.device_kv_used_bytes)
    yield _gauge("device_kv_pool_bytes", "Size of these pools", stats.device_kv_pool_bytes)
    ranks = {str(rank): size for rank, size in enumerate(stats.device_memory_peak_bytes)}
    yield _gauge("device_memory_planned_bytes", "Weights, activations and KV pool", ranks, label="rank")


def _one_hot(phase: str) -> dict[str, int]:
    return {name: int(name == phase) for name in PHASES}


def _counter(name: str, text: str, value: float | Mapping[str, float], *, label: str = "") -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily, name, text, value, label)


def _gauge(name: str, text: str, value: float | Mapping[str, float], *, label: str = "") -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily, name, text, value, label)


def _filled(family: Any, name: str, text: str, value: float | Mapping[str, float], label: str) -> Metric:
    metric = family(f"seesaw_{name}", f"{text}.", labels=[label] if label else [])
    for of, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
        metric.add_metric([] if of is None else [of], number)
    return metric  # type: ignore[no-any-return]
