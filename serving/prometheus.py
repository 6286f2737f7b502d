"""What the gateway tells Prometheus at `/metrics`. Each gateway counts its own."""

from __future__ import annotations

from math import isfinite

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.best_of_n import Pool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """`cappy_serving_requests_total{route, status}`, `cappy_serving_seconds{stage}` and what was sampled and scored."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("cappy_serving_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "cappy_serving_seconds",
            "Seconds of a request by stage: waiting for its turn, sampling, scoring; total is all of them",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        tenths = [number / 10 for number in range(11)]
        self._scores = Histogram("cappy_serving_score", "Scores of candidates, raw logits", buckets=tenths, registry=self.registry)
        self._candidates = Counter("cappy_serving_candidates", "Candidates sampled", registry=self.registry)
        self._tokens = Counter("cappy_serving_tokens", "Tokens", ["kind"], registry=self.registry)
        self._fallbacks = Counter("cappy_serving_fallbacks", "Answers chosen without the scorer", ["how"], registry=self.registry)
        self._retries = Counter("cappy_serving_scorer_retries", "Calls of the scorer sent again", registry=self.registry)
        self._cost = Counter("cappy_serving_cost_dollars", "What sampling at an endpoint with prices cost", registry=self.registry)
        self._stopped = Counter(
            "cappy_serving_stopped", "Pools that grew no further in rounds, or whose scorer failed", ["why"], registry=self.registry
        )
        self._abstentions = Counter("cappy_serving_abstentions", "Answers withheld below `min_score`", registry=self.registry)
        self.requests_in_progress = Gauge("cappy_serving_requests_here", "Requests in work or waiting", registry=self.registry)

    def count_request(self, route: str, status: int) -> None:
        """Count a request, by its route's pattern: paths of a client's own making would be without end."""
        self._requests.labels(route, str(status)).inc()

    def observe_seconds(self, stage: str, seconds: float) -> None:
        """Note the seconds of a stage: `queue`, `sampling`, `scoring`, or `total` for what the models work on."""
        self._seconds.labels(stage).observe(seconds)

    def observe_pool(self, pool: Pool) -> None:
        """Count a pool: its candidates, tokens and dollars, the scores of its different responses, its time, and why it grew no further."""
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
        """Count a call of the scorer that is sent again."""
        self._retries.inc()

    def count_fallback(self, how: str) -> None:
        """Count an answer chosen without the scorer."""
        self._fallbacks.labels(how).inc()

    def count_abstention(self) -> None:
        """Count an answer withheld."""
        self._abstentions.inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
