"""Points, sampled tokens and time of smaller pools, and of early stopping, replayed over the candidates of a suite. No Ray, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.config import AdaptiveConfig, Config, DecodingConfig
from evaluation import statistics
from evaluation.statistics import Integers
from evaluation.suites.pools import Pools, Row, pool_values
from evaluation.suites.steps import Steps
from training.early_stopping import plan_rounds, stop_reason

_SHOWN = ("greedy", "self_mean", "consensus", "random", "scorer", "scorer_fitted", "adapted", "fitted", "oracle")


def order_pool(candidates: Sequence[Mapping[str, Any]], decodings: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the positions of the candidates in the order of sampling: the greedy ones, then one of each other decoding in turn."""
    temperature = {each["name"]: each["temperature"] for each in decodings}
    place = {each["name"]: number for number, each in enumerate(decodings)}
    seen: dict[str, int] = {}
    keys = []
    for position, each in enumerate(candidates):
        name = each["decoding"]
        turn = seen[name] = seen.get(name, -1) + 1
        keys.append((temperature.get(name, 1.0) > 0, turn, place.get(name, len(place)), position))
    return [key[-1] for key in sorted(keys)]


def stop_size(pool: Sequence[Mapping[str, Any]], score: str, decodings: Sequence[Mapping[str, Any]], settings: AdaptiveConfig) -> int:
    """Return how many candidates a server samples with early stopping, for a pool in the order of sampling.

    `score` is the field with the scores of the candidates.
    """
    rounds = plan_rounds([DecodingConfig.model_validate(each) for each in decodings], 1, settings.round_size)
    # As in a server: at a higher temperature, responses repeat less often than the probabilities at temperature 1 predict.
    use_logprobs = all(each.temperature <= 1 for drawn in rounds for each in drawn)
    for end in np.cumsum([sum(each.n for each in drawn) for drawn in rounds]).tolist():
        part: Any = pool[:end]
        if end >= len(pool) or stop_reason(part, [each[score] for each in part], settings, use_logprobs=use_logprobs):
            return min(int(end), len(pool))
    return len(pool)


def replay_costs(
    pools: Pools, rows: Sequence[Row], folds_R: Integers, tasks_R: Integers, config: Config, rates: Mapping[str, Any], steps: Steps
) -> list[dict[str, Any]]:
    """Return points, sampled tokens and time of pools of the first k candidates, and of pools that early stopping ends.

    There is an entry for each k of `suite.pool_sizes`, and one for each of `suite.min_gains`. `candidates`, `tokens` and `distinct` are
    means per instruction. `sampling_seconds` are the tokens over the measured rate of the sampling, and
    `scoring_seconds` the distinct responses over the measured rate of the scoring; null without a rate.
    """
    suite = config.suite
    assert suite is not None
    scored = [each for name, each in steps.measured.items() if name.startswith("score ") and each.get("pairs")]
    seconds = sum(each["scoring_seconds"] for each in scored)
    pairs_per_second = sum(each["pairs"] for each in scored) / seconds if seconds else None
    tokens_per_second = rates.get("tokens_per_second")
    ordered = [[row["candidates"][index] for index in order_pool(row["candidates"], pools.decodings)] for row in rows]
    largest = max(map(len, ordered))

    def entry(parts: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        tokens = float(np.mean([sum(each["tokens"] or 0 for each in part) for part in parts]))
        distinct = float(np.mean([len({each["response"] for each in part}) for part in parts]))
        return {
            "candidates": float(np.mean([len(part) for part in parts])),
            "tokens": tokens,
            "distinct": distinct,
            "sampling_seconds": tokens / tokens_per_second if tokens_per_second else None,
            "scoring_seconds": distinct / pairs_per_second if pairs_per_second else None,
            "points": _points(pools, rows, folds_R, tasks_R, parts, config),
        }

    found = [
        {**entry([pool[:size] for pool in ordered]), "min_gain": None} for size in sorted({min(each, largest) for each in suite.pool_sizes})
    ]
    score = next((name for name in ("adapted", "scorer") if name in pools.models), None)
    for min_gain in suite.min_gains if score else ():
        settings = config.serving.adaptive.model_copy(update={"min_gain": min_gain})
        parts = [pool[: stop_size(pool, str(score), pools.decodings, settings)] for pool in ordered]
        found.append({**entry(parts), "min_gain": min_gain})
    return found


def _points(
    pools: Pools, rows: Sequence[Row], folds_R: Integers, tasks_R: Integers, parts: Sequence[Sequence[Mapping[str, Any]]], config: Config
) -> dict[str, dict[str, float]]:
    """Return the average over tasks of each method on parts of the pools, with its interval over rows."""
    settings = config.evaluation
    values = pool_values(pools, rows, folds_R, parts)
    shown = [name for name in _SHOWN if name in values and not np.isnan(values[name]).any()]
    values_RM = np.stack([values[name] for name in shown], axis=1)
    points_M = 100 * statistics.macro_average(values_RM, tasks_R)
    samples_BM = 100 * statistics.bootstrap(values_RM, tasks_R, settings.resamples, config.seed).mean(axis=1)
    low_M, high_M = statistics.interval(samples_BM, settings.confidence)
    return {
        name: {"mean": float(points_M[index]), "low": float(low_M[index]), "high": float(high_M[index])} for index, name in enumerate(shown)
    }
