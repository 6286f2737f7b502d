"""The Prometheus metrics of a gateway, served at `/metrics`. Each gateway replica has its own registry. Imports no Ray."""

from __future__ import annotations

from math import isfinite

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.best_of_n import Pool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of requests, stages, candidates, scores, tokens and cost."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("cappy_serving_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "cappy_serving_seconds",
            "Seconds of a request by stage: queue, sampling, scoring; total is the whole request",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        tenths = [number / 10 for number in range(11)]
        self._scores = Histogram("cappy_serving_score", "Scores of candidates, raw logits", buckets=tenths, registry=self.registry)
        self._candidates = Counter("cappy_serving_candidates", "Candidates sampled", registry=self.registry)
        self._tokens = Counter("cappy_serving_tokens", "Tokens", ["kind"], registry=self.registry)
        self._fallbacks = Counter("cappy_serving_fallbacks", "Answers selected without the scorer", ["how"], registry=self.registry)
        self._retries = Counter("cappy_serving_scorer_retries", "Retries of scorer calls", registry=self.registry)
        self._cost = Counter("cappy_serving_cost_dollars", "Cost of sampling at an endpoint with prices", registry=self.registry)
        self._stopped = Counter("cappy_serving_stopped", "Requests whose sampling stopped, by reason", ["why"], registry=self.registry)
        self._abstentions = Counter("cappy_serving_abstentions", "Answers withheld below `min_score`", registry=self.registry)
        self._logged = Counter("cappy_serving_logged", "Rows of the log of candidates, by result", ["result"], registry=self.registry)
        self.requests_in_progress = Gauge("cappy_serving_requests_here", "Requests running or queued", registry=self.registry)

    def count_request(self, route: str, status: int) -> None:
        """Count a request. `route` is the route's pattern: the paths that clients send are unlimited in number."""
        self._requests.labels(route, str(status)).inc()

    def observe_seconds(self, stage: str, seconds: float) -> None:
        """Record the seconds of a stage: `queue`, `sampling`, `scoring`, or `total` for a whole request to a model."""
        self._seconds.labels(stage).observe(seconds)

    def observe_pool(self, pool: Pool) -> None:
        """Record a pool: its candidates, tokens and dollars, the scores of its distinct responses, its seconds and its stop reason."""
        candidates = pool.candidates
        self._cost.inc(pool.cost or 0.0)
        self._candidates.inc(len(candidates))
        self._tokens.labels("prompt").inc(pool.prompt_tokens)
        self._tokens.labels("sampled").inc(sum(candidate["tokens"] for candidate in candidates))
        for score in filter(isfinite, pool.score_of.values()):
            self._scores.observe(score)
        self.observe_seconds("sampling", pool.sampling_s)
        self.observe_seconds("scoring", pool.scoring_s)
        if pool.stop_reason:
            self._stopped.labels(pool.stop_reason).inc()

    def count_scorer_retry(self) -> None:
        """Count a retry of a scorer call."""
        self._retries.inc()

    def count_fallback(self, how: str) -> None:
        """Count an answer selected without the scorer; `how` is the fallback."""
        self._fallbacks.labels(how).inc()

    def count_abstention(self) -> None:
        """Count an answer that was withheld because of `min_score`."""
        self._abstentions.inc()

    def count_logged(self, result: str, rows: int) -> None:
        """Count rows of the log of candidates that were `written` or `dropped`."""
        self._logged.labels(result).inc(rows)

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
