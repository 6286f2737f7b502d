"""Prometheus metrics of `cappy generate`, served by the driver at `/metrics` during the run. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from cluster import ports
from cluster.config import GenerateConfig
from generation.units import UnitCounts, count_drawn

_COUNTERS = {
    "candidates": "Candidates sampled by this process",
    "tokens": "Tokens sampled by this process",
    "dollars": "Dollars this process spent at an endpoint",
    "dead_letters": "Instructions that could not be sampled",
}


class GenerateMetrics:
    """The metrics of one run: two gauges of instructions, and the counters of `_COUNTERS`.

    The gauge `cappy_generate_instructions_done` includes the instructions of earlier attempts; the counters do not.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._total = Gauge("cappy_generate_instructions", "Instructions of the whole run", registry=self.registry)
        self._done = Gauge("cappy_generate_instructions_done", "Instructions sampled, labelled and saved", registry=self.registry)
        self._counters = {name: Counter(f"cappy_generate_{name}", text, registry=self.registry) for name, text in _COUNTERS.items()}

    def start(self, total: int, done: int) -> None:
        """Set the gauges at the start of sampling; earlier attempts finished `done` of `total` instructions."""
        self._total.set(total)
        self._done.set(done)

    def add(self, unit: UnitCounts) -> None:
        """Add the counts of a finished unit."""
        self._done.inc(unit["rows"])
        values = {**count_drawn(unit), "dollars": unit["cost"], "dead_letters": unit["dead_letters"]}
        for name, counter in self._counters.items():
            counter.inc(values[name])


@contextmanager
def serve_metrics(config: GenerateConfig) -> Iterator[GenerateMetrics]:
    """Yield the metrics of a run; serve them inside the block if `generate.metrics_port` is set.

    Raises the errors of `ports.check_port` if the address cannot be used.
    """
    metrics = GenerateMetrics()
    if config.metrics_port is None:
        yield metrics
        return
    ports.check_port(config.metrics_host, config.metrics_port, "generate.metrics_")
    server, thread = start_http_server(config.metrics_port, config.metrics_host, metrics.registry)
    try:
        yield metrics
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
