"""The progress of `cappy generate` for Prometheus, told by the driver at `/metrics` while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from cluster import ports
from cluster.config import GenerateConfig

_COUNTERS = {
    "candidates": "Candidates sampled by this process",
    "tokens": "Tokens sampled by this process",
    "dollars": "Dollars this process spent at an endpoint",
    "dead_letters": "Instructions that could not be sampled",
}


class GenerateMetrics:
    """Gauges of instructions (`cappy_generate_instructions`, and those `_done`, earlier attempts included) and counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._total = Gauge("cappy_generate_instructions", "Instructions of the whole run", registry=self.registry)
        self._done = Gauge("cappy_generate_instructions_done", "Instructions sampled, labelled and saved", registry=self.registry)
        self._counters = {name: Counter(f"cappy_generate_{name}", text, registry=self.registry) for name, text in _COUNTERS.items()}

    def start(self, total: int, done: int) -> None:
        """Sampling begins: `done` of `total` instructions are there from before."""
        self._total.set(total)
        self._done.set(done)

    def add(self, unit: Mapping[str, Any]) -> None:
        """Count a finished unit (`units.COUNTS`)."""
        self._done.inc(unit["rows"])
        for name, counter in self._counters.items():
            counter.inc(unit["cost" if name == "dollars" else name])


@contextmanager
def serve_metrics(config: GenerateConfig) -> Iterator[GenerateMetrics]:
    """Serve the metrics inside the block where `generate.metrics_port` is set. Raises what `ports.check` does."""
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
