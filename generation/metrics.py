"""The progress of `cappy generate` for Prometheus, told by the driver at `/metrics` while it samples."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from cluster.config import GenerateConfig
from cluster.errors import UsageError

_COUNTERS = {
    "candidates": "Candidates sampled by this process",
    "tokens": "Tokens sampled by this process",
    "dollars": "Dollars this process spent at an endpoint",
    "dead_letters": "Instructions that could not be sampled",
}


class Metrics:
    """Gauges of instructions (`cappy_generate_instructions`, and those `_done`, earlier attempts included) and counters."""

    def __init__(self, total: int, done: int) -> None:
        self.registry = CollectorRegistry()
        Gauge("cappy_generate_instructions", "Instructions of the whole run", registry=self.registry).set(total)
        self._done = Gauge("cappy_generate_instructions_done", "Instructions sampled, labelled and saved", registry=self.registry)
        self._done.set(done)
        self._counters = {name: Counter(f"cappy_generate_{name}", text, registry=self.registry) for name, text in _COUNTERS.items()}

    def add(self, unit: Mapping[str, Any]) -> None:
        """Count a finished unit (`units.COUNTS`)."""
        self._done.inc(unit["rows"])
        for name, counter in self._counters.items():
            counter.inc(unit["cost" if name == "dollars" else name])


@contextmanager
def exposed(config: GenerateConfig, total: int, done: int) -> Iterator[Metrics]:
    """Serve the metrics inside the block where `generate.metrics_port` is set. Raises `UsageError` when the port is in use."""
    metrics = Metrics(total, done)
    if config.metrics_port is None:
        yield metrics
        return
    try:
        server, thread = start_http_server(config.metrics_port, config.metrics_host, metrics.registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UsageError(
                f"generate.metrics_host={config.metrics_host}: {error.strerror}; take 127.0.0.1 or an address of this machine"
            ) from None
        raise UsageError(
            f"generate.metrics_port={config.metrics_port} is in use on {config.metrics_host}; choose another, or null for none"
        ) from None
    try:
        yield metrics
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
