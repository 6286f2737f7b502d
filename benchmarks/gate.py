"""Rules for the gate of `cappy adapt`, simulated: how often each publishes, and the points that its wrong decisions cost.

    python -m benchmarks.gate

A task has `rows` train rows and a quarter as many validation rows. Its adapted scorer has a true gain over the base, in points. A
row changes its pick with probability `--changed`; the difference is then the gain / `--changed` plus a uniform draw of
+-`--spread` points. The scorers of the folds have `--kept` of the gain, because they are trained on fewer rows, and a normal error
of `--noise` points, because training varies. Rules:

- `validation`: the mean gain is above 0 on half of the validation rows (the rule without cross-validation, `adapt.folds: 0`);
- `mean`: the mean cross-validated gain of the train rows is above 0;
- `low 50`, `low 80`: the lower end of its 50 % or 80 % interval is above 0.

The first table has the share of published scorers by true gain. The second has the cost: the mean points lost against a perfect
decision, over normally distributed true gains with mean `--mean` and deviation `--deviation`. A loss is a published scorer with a
negative gain, or a rejected one with a positive gain.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

RULES = ("validation", "mean", "low 50", "low 80")
_NORMAL_QUANTILES = {"low 50": 0.674, "low 80": 1.282}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 100, 200], help="train rows of a task")
    parser.add_argument("--gains", type=float, nargs="+", default=[-4, -2, -1, 0, 1, 2, 4], help="true gains, in points")
    parser.add_argument("--changed", type=float, default=0.4, help="share of rows with another pick")
    parser.add_argument("--spread", type=float, default=70.0, help="half of the range of a row's difference, in points")
    parser.add_argument("--kept", type=float, default=0.8, help="share of the gain that the scorers of the folds have")
    parser.add_argument("--noise", type=float, default=0.5, help="deviation of the gain between trainings, in points")
    parser.add_argument("--mean", type=float, default=1.0, help="mean of the true gains of the second table, in points")
    parser.add_argument("--deviation", type=float, default=3.0, help="deviation of the true gains of the second table, in points")
    parser.add_argument("--tasks", type=int, default=4000, help="simulated tasks for each figure")
    arguments = parser.parse_args()
    draw = np.random.default_rng(1)
    results = []
    print(f"share published\n{'rows':>5} {'rule':<11}" + "".join(f"{gain:>+7g}" for gain in arguments.gains) + f"{'cost':>9}")
    for rows in arguments.rows:
        by_gain = [decide(np.full(arguments.tasks, gain), rows, arguments, draw) for gain in arguments.gains]
        gains = draw.normal(arguments.mean, arguments.deviation, arguments.tasks)
        decisions = decide(gains, rows, arguments, draw)
        for rule in RULES:
            shares = [float(published[rule].mean()) for published in by_gain]
            cost = float(np.where(decisions[rule] == (gains > 0), 0, np.abs(gains)).mean())
            results.append({"rows": rows, "rule": rule, "published": dict(zip(arguments.gains, shares, strict=True)), "cost": cost})
            print(f"{rows:>5} {rule:<11}" + "".join(f"{share:>7.0%}" for share in shares) + f"{cost:>9.2f}")
    print(json.dumps(results))


def decide(gains: np.ndarray, rows: int, settings: argparse.Namespace, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Return whether each rule publishes the scorer of each task, bool (tasks,); `gains` has the true gains in points, (tasks,)."""
    kept = settings.kept * gains + draw.normal(0, settings.noise, len(gains))
    train = differences(kept, rows, settings, draw)
    validation = differences(gains, max(rows // 8, 1), settings, draw)
    mean, error = train.mean(axis=1), train.std(axis=1, ddof=1) / np.sqrt(rows)
    return {
        "validation": validation.mean(axis=1) > 0,
        "mean": mean > 0,
        **{rule: mean - quantile * error > 0 for rule, quantile in _NORMAL_QUANTILES.items()},
    }


def differences(gains: np.ndarray, rows: int, settings: argparse.Namespace, draw: np.random.Generator) -> np.ndarray:
    """Return the gain of each row in points, (tasks, rows), with mean `gains`."""
    changed = draw.random((len(gains), rows)) < settings.changed
    values = gains[:, None] / settings.changed + draw.uniform(-settings.spread, settings.spread, changed.shape)
    return np.where(changed, values, 0.0)


if __name__ == "__main__":
    main()
