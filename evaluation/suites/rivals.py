"""The rivals of a suite: compute and keep the numbers of `suite.rivals` and `suite.scorers` for all candidates. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.config import Config
from evaluation.embedding import SentenceEncoder
from evaluation.evaluate import PairScorer
from evaluation.likelihood import ChoiceLikelihood
from evaluation.rivals import EMBEDDING_MODEL, RIVALS, rank_rows
from evaluation.statistics import Floats
from evaluation.suites.scores import Row, ScoreStore, score_candidates
from evaluation.suites.steps import Steps
from training.adapt import folder_name


def add_rivals(config: Config, rows: Sequence[Row], store: ScoreStore, steps: Steps, load: Callable[[str], PairScorer]) -> dict[str, str]:
    """Add a field for each rival to the candidates of all rows; return the title of each field.

    A rival costs a step with `pairs`, `tokens` and `scoring_seconds`. Kept numbers are not computed again.
    """
    suite = config.suite
    assert suite is not None
    tasks = sorted({row["dataset"] for row in rows})
    titles: dict[str, str] = {}
    models: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in models:
            models[kind] = ChoiceLikelihood(config.sampler, suite.neutral_prompt) if kind == "llm" else SentenceEncoder(EMBEDDING_MODEL)
        return models[kind]

    sampler = config.sampler
    for name in suite.rivals:
        kind = RIVALS[name].model

        def compute(task: str, unit: Sequence[Row], name: str = name, kind: str = kind) -> list[Floats]:
            texts = [[each["response"] for each in row["candidates"]] for row in unit]
            return rank_rows(name, model(kind), [row["instruction"] for row in unit], texts)

        key = [name, sampler.model, sampler.prompt.model_dump(mode="json")] if kind == "llm" else [name, EMBEDDING_MODEL]
        with steps.step(f"rival {name}") as measured:
            pairs, seconds, tokens = store.pairs, store.seconds, models[kind].tokens if kind in models else 0
            _add(rows, name, store.read_or_compute(f"rival-{name}", rows, dict.fromkeys(tasks, key), compute))
            read = models[kind].tokens - tokens if kind in models else 0
            measured |= {"pairs": store.pairs - pairs, "scoring_seconds": store.seconds - seconds, "tokens": read}
        titles[name] = RIVALS[name].title
    models.clear()
    for uri in suite.scorers:
        last = uri.rstrip("/").rsplit("/", 1)[-1]
        field = f"scorer:{last}"
        with steps.step(field) as measured:
            pairs, seconds = store.pairs, store.seconds
            _add(rows, field, score_candidates(store, folder_name(field), rows, dict.fromkeys(tasks, uri), load))
            measured |= {"pairs": store.pairs - pairs, "scoring_seconds": store.seconds - seconds}
        titles[field] = f"Scorer {last}"
    return titles


def _add(rows: Sequence[Row], name: str, numbers: Sequence[Floats]) -> None:
    for row, values_C in zip(rows, numbers, strict=True):
        for each, value in zip(row["candidates"], values_C.tolist(), strict=True):
            each[name] = value
