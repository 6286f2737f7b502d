r"""Compare adaptive sampling with fixed numbers of candidates: Rouge-L of the choice against tokens sampled.

It replays the candidates of a published set and samples nothing. The candidates of one decoding are independent draws from one
distribution, so all their orders are equally likely. Each instruction is replayed in several random orders: greedy first, then the
decodings in turn, as `serve` draws them. A replay ends after n candidates, or by the rule of `serving.adaptive` at each setting of
a grid. Two assumptions: a server's draws differ from the set's draws only in their seeds, and a request draws at most the whole pool.

    S='--set workspace=runs/curve --set source.train_rows=64 --set source.validation_rows=48'
    D='sampler.decodings=[{"name": "greedy", "temperature": 0, "max_tokens": 32, "stop": ["\n"]},
       {"name": "temperature", "n": 16, "temperature": 0.9, "max_tokens": 32, "stop": ["\n"]},
       {"name": "top-k", "n": 16, "top_k": 40, "max_tokens": 32, "stop": ["\n"]}]'
    cappy generate demo $S --set "$D"
    cappy train    demo $S --set "$D"
    python -m benchmarks.adaptive --set runs/curve/dataset --scorer runs/curve/scorer --plot docs/adaptive.svg --json -

The rule's prior is fitted on train rows, and a setting is chosen there. The choice is the setting with the fewest tokens that
loses at most `--tolerance` points of Rouge-L against the whole pool. The figures are from validation rows: averages over tasks, with
95 % bootstrap intervals over instructions. The scorer was trained on the train rows and scores them better than new rows, so the
chosen setting is only a guess.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import demo_scorer, demo_set
from cluster.config import AdaptiveConfig, DecodingConfig
from cluster.errors import CappyError
from cluster.progress import Bar, log
from evaluation import statistics
from evaluation.comparison import Row
from evaluation.evaluate import read_rows, score_rows
from evaluation.statistics import Floats
from generation.dataset import RegressionSet
from serving import ranking
from training import early_stopping

MIN_GAINS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
TARGETS = (0.3, 0.5, 0.7, 0.9)
RESAMPLES = 2000
CONFIDENCE = 0.95
MEASURES = ("rouge_l", "tokens", "candidates")
"""Figures of a replay: Rouge-L of the chosen candidate, tokens sampled, candidates drawn.

Letters in names of arrays: R rows, W ways to draw, M measures, B bootstrap samples."""

Way = int | AdaptiveConfig
"""A fixed number of candidates, or the settings of early stopping."""


def grid(prior: AdaptiveConfig, size: int) -> dict[str, Way]:
    """Return every way to draw that is compared, by name; `all` draws the whole pool of `size` candidates."""
    ways: dict[str, Way] = {f"n={2**power}": 2**power for power in range(size.bit_length()) if 2**power < size}
    ways["all"] = size
    ways |= {f"min_gain={gain:g}": prior.model_copy(update={"min_gain": gain}) for gain in MIN_GAINS}
    return ways | {f"target_score={target:g}": prior.model_copy(update={"target_score": target}) for target in TARGETS}


def fitted_prior(rows: Sequence[Row], round_size: int) -> AdaptiveConfig:
    """Return the rule with a prior fitted to these rows: mean and standard deviation of the scores of one instruction."""
    own = [np.array(list({each["response"]: each["score"] for each in row["candidates"] if each["response"]}.values())) for row in rows]
    mean = float(np.mean([scores.mean() for scores in own if len(scores)]))
    variance = float(np.mean([scores.var(ddof=1) for scores in own if len(scores) > 1]))
    return AdaptiveConfig(round_size=round_size, prior_mean=round(mean, 3), prior_std=round(variance**0.5, 3))


def replay(rounds: Sequence[Sequence[dict[str, Any]]], ways: Mapping[str, Way]) -> Floats:
    """Return the figures of each way on one order of a pool, [W, M]."""
    drawn: Any = [candidate for round_ in rounds for candidate in round_]
    scores = [candidate["score"] for candidate in drawn]
    ends = np.cumsum([len(round_) for round_ in rounds]).tolist()
    points = np.empty((len(ways), len(MEASURES)))
    for place, way in enumerate(ways.values()):
        if isinstance(way, int):
            end = way
        else:
            end = next((e for e in ends[:-1] if early_stopping.stop_reason(drawn[:e], scores[:e], way)), ends[-1])
        pick = ranking.rank_candidates(drawn[:end], scores[:end])[0]
        points[place] = drawn[pick]["label"], sum(each["tokens"] for each in drawn[:end]), end
    return points


def replay_all(
    rows: Sequence[Row], decodings: Sequence[DecodingConfig], ways: Mapping[str, Way], round_size: int, orders: int, seed: int
) -> Floats:
    """Return the figures of each way on each row, averaged over random orders of the row's pool, [R, W, M]."""
    plan = early_stopping.plan_rounds(decodings, 1, round_size)
    points_RWM = np.zeros((len(rows), len(ways), len(MEASURES)))
    with Bar("replaying", len(rows), "instructions") as bar:
        for place, row in enumerate(rows):
            rng = np.random.default_rng([seed, place])
            for _ in range(orders):
                shuffled = [row["candidates"][position] for position in rng.permutation(len(row["candidates"]))]
                left = {decoding.name: iter([each for each in shuffled if each["decoding"] == decoding.name]) for decoding in decodings}
                rounds = [[next(left[part.name]) for part in parts for _ in range(part.n)] for parts in plan]
                points_RWM[place] += replay(rounds, ways) / orders
            bar.advance()
    return points_RWM


def averages(points_RWM: Floats, rows: Sequence[Row], seed: int) -> tuple[Floats, Floats]:
    """Return the averages over tasks of each way and measure, [W, M], and their bootstrap samples, [B, W, M]."""
    _, tasks_R = np.unique([row["dataset"] for row in rows], return_inverse=True)
    flat_RX = points_RWM.reshape(len(rows), -1)
    shape = points_RWM.shape[1:]
    samples_BX = statistics.bootstrap(flat_RX, tasks_R, RESAMPLES, seed).mean(axis=1)
    return statistics.macro_average(flat_RX, tasks_R).reshape(shape), samples_BX.reshape(-1, *shape)


def choose(points_WM: Floats, ways: Mapping[str, Way], tolerance: float) -> str:
    """Return the name of the `min_gain` with the fewest tokens among those within `tolerance` points of the whole pool's Rouge-L.

    If no `min_gain` is within the tolerance, return the smallest one.
    """
    names = list(ways)
    least = points_WM[names.index("all"), 0] - tolerance / 100
    good = [name for place, name in enumerate(names) if name.startswith("min_gain") and points_WM[place, 0] >= least]
    return min(good, key=lambda name: points_WM[names.index(name), 1]) if good else f"min_gain={MIN_GAINS[0]:g}"


def report(points_WM: Floats, samples_BWM: Floats, ways: Mapping[str, Way], chosen: str) -> dict[str, Any]:
    """Return the curve, with each way compared with the whole pool (paired), and the chosen way.

    For the chosen way, also return the tokens that a fixed number of candidates needs for the same Rouge-L (None if no number reaches it).
    """
    names = list(ways)
    points_WM, samples_BWM = points_WM * [100, 1, 1], samples_BWM * [100, 1, 1]
    whole, mine = names.index("all"), names.index(chosen)
    curve: dict[str, Any] = {}
    for place, name in enumerate(names):
        curve[name] = {measure: _estimate(points_WM[place, at], samples_BWM[:, place, at]) for at, measure in enumerate(MEASURES)}
        less = points_WM[place, 0] - points_WM[whole, 0], samples_BWM[:, place, 0] - samples_BWM[:, whole, 0]
        share = points_WM[place, 1] / points_WM[whole, 1], samples_BWM[:, place, 1] / samples_BWM[:, whole, 1]
        curve[name] |= {"rouge_l_minus_all": _estimate(*less), "tokens_share_of_all": _estimate(*share)}
    fixed = [place for place, way in enumerate(ways.values()) if isinstance(way, int)]
    # The running maximum makes the fixed curve monotone, so that it can be read at the chosen way's Rouge-L.
    rising = np.maximum.accumulate(points_WM[fixed, 0])
    same = float(np.interp(points_WM[mine, 0], rising, points_WM[fixed, 1])) if points_WM[mine, 0] <= rising[-1] else None
    return {"curve": curve, "chosen": {"setting": chosen, "tokens_of_fixed_n_at_same_rouge_l": same and round(same, 1)}}


def _estimate(mean: float, samples_B: Floats) -> dict[str, float]:
    low, high = statistics.interval(samples_B, CONFIDENCE)
    return {"mean": round(float(mean), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def plot(curve: Mapping[str, Any]) -> bytes:
    """Return the curve as SVG: Rouge-L against tokens sampled, with one line for each kind of stopping rule."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fixed = [name for name in curve if name.startswith("n=")] + ["all"]
    lines = {
        "a fixed number of candidates": (fixed, "#777777", "o--", -12),
        "until the expected gain is below min_gain": ([name for name in curve if name.startswith("min_gain")], "#1f5fa8", "o-", 6),
        "until the best score reaches target_score": ([name for name in curve if name.startswith("target")], "#c8552d", "s:", -12),
    }
    for title, (names, colour, style, above) in lines.items():
        tokens, points = ([curve[name][measure]["mean"] for name in names] for measure in ("tokens", "rouge_l"))
        axes.plot(tokens, points, style, color=colour, label=title, markersize=4)
        for name, x, y in zip(names, tokens, points, strict=True):
            axes.annotate(name.split("=")[-1], (x, y), xytext=(0, above), textcoords="offset points", fontsize=7, color=colour, ha="center")
    low, high = ([curve[name]["rouge_l"][end] for name in fixed] for end in ("low", "high"))
    axes.fill_between([curve[name]["tokens"]["mean"] for name in fixed], low, high, color="#777777", alpha=0.12)
    axes.set_xlabel("tokens sampled per instruction")
    axes.set_ylabel("Rouge-L of the pick, points, average over tasks")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    sink = io.BytesIO()
    # A fixed salt and no date: equal figures give equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cappy-ray"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def load(dataset: RegressionSet, split: str, scorer: Any, decodings: Sequence[DecodingConfig]) -> list[Row]:
    """Return a split's rows with scored candidates.

    A row that lacks a candidate or a token count cannot be replayed and is left out. Raises `CappyError` if no row remains.
    """
    rows, _ = read_rows(dataset, split)
    size = sum(decoding.n for decoding in decodings)
    whole = [row for row in rows if len(row["candidates"]) == size and all(each["tokens"] is not None for each in row["candidates"])]
    if not whole:
        raise CappyError(
            f"--set={dataset.uri}: no {split} row has all {size} candidates of sampler.decodings; use a set without max_per_bin"
        )
    log(f"{split}: {len(whole)} of {len(rows)} rows with {size} candidates each")
    return score_rows(scorer, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", help="a published set with sampled candidates; default: the demo's set, generated if it is missing")
    parser.add_argument("--scorer", help="the scorer trained on that set; default: the demo's scorer, trained if it is missing")
    parser.add_argument("--orders", type=int, default=10, help="random orders in which each pool is replayed")
    parser.add_argument("--round-size", type=int, default=AdaptiveConfig().round_size)
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of Rouge-L that the chosen setting may lose on train rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="file for the SVG")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if (options.set is None) != (options.scorer is None):
        parser.error(f"--set={options.set} with --scorer={options.scorer}: give both, or neither (the demo's are used)")
    options.set, options.scorer = options.set or demo_set(), options.scorer or demo_scorer()
    from training.scorer import Scorer

    dataset = RegressionSet(options.set, "--set")
    decodings = [DecodingConfig.model_validate(each) for each in dataset.manifest["config"]["sampler"]["decodings"]]
    scorer = Scorer.load(options.scorer, dtype="float32", setting="--scorer")
    rows = {split: load(dataset, split, scorer, decodings) for split in ("train", "validation")}
    prior = fitted_prior(rows["train"], options.round_size)
    ways = grid(prior, sum(decoding.n for decoding in decodings))
    points = {split: replay_all(rows[split], decodings, ways, options.round_size, options.orders, options.seed) for split in rows}
    chosen = choose(averages(points["train"], rows["train"], options.seed)[0], ways, options.tolerance)
    result = {
        "set": options.set,
        "scorer": options.scorer,
        "tasks": len({row["dataset"] for row in rows["validation"]}),
        "rows": {split: len(each) for split, each in rows.items()},
        "orders": options.orders,
        "prior": prior.model_dump(include={"prior_mean", "prior_std", "prior_weight", "round_size"}),
        **report(*averages(points["validation"], rows["validation"], options.seed), ways, chosen),
    }
    for name, figures in result["curve"].items():
        rouge, tokens, drawn = (figures[measure] for measure in MEASURES)
        estimate = f"{rouge['mean']:6.2f} ({rouge['low']:.1f} to {rouge['high']:.1f})"
        less = figures["rouge_l_minus_all"]
        mark = "  chosen on train rows" if name == chosen else ""
        versus = f"{less['mean']:+7.2f} ({less['low']:+.1f} to {less['high']:+.1f})"
        print(f"{name:<18}{estimate}{versus} against all{tokens['mean']:9.1f} tokens{drawn['mean']:7.2f} candidates{mark}")
    if options.plot:
        Path(options.plot).write_bytes(plot(result["curve"]))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
