"""The rivals of a suite: compute and keep the numbers of `suite.rivals` and `suite.scorers` for all candidates. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.config import Config, SuiteConfig
from evaluation.embedding import SentenceEncoder
from evaluation.evaluate import PairScorer
from evaluation.likelihood import ChoiceLikelihood
from evaluation.rivals import EMBEDDING_MODEL, RIVALS, rank_rows
from evaluation.statistics import Floats
from evaluation.suites.scores import Row, ScoreStore, add_field, score_candidates
from evaluation.suites.steps import Steps
from training.adapt import folder_name


def add_rivals(config: Config, rows: Sequence[Row], store: ScoreStore, steps: Steps, load: Callable[[str], PairScorer]) -> dict[str, str]:
    """Add a field for each rival and each further scorer to the candidates of all rows; return the title of each field.

    Each one is a step with `pairs` and `scoring_seconds`, a rival also with `tokens`. Kept numbers are not computed again.
    """
    suite = config.suite
    assert suite is not None
    tasks = sorted({row["dataset"] for row in rows})
    titles: dict[str, str] = {}
    models = _Models(config, suite)
    for name in suite.rivals:
        with steps.step(f"rival {name}") as measured:
            pairs, seconds, tokens = store.pairs, store.seconds, models.tokens
            keys = dict.fromkeys(tasks, models.key(name))
            add_field(rows, name, store.read_or_compute(f"rival-{name}", rows, keys, models.compute(name)))
            measured |= {"pairs": store.pairs - pairs, "scoring_seconds": store.seconds - seconds, "tokens": models.tokens - tokens}
        titles[name] = RIVALS[name].title
    del models  # an LLM takes memory that the scorers need
    for uri in suite.scorers:
        last = uri.rstrip("/").rsplit("/", 1)[-1]
        field = f"scorer:{last}"
        with steps.step(field) as measured:
            pairs, seconds = store.pairs, store.seconds
            add_field(rows, field, score_candidates(store, folder_name(field), rows, dict.fromkeys(tasks, uri), load))
            measured |= {"pairs": store.pairs - pairs, "scoring_seconds": store.seconds - seconds}
        titles[field] = f"Scorer {last}"
    return titles


class _Models:
    """The models of the rivals, each loaded for the first unit that needs it."""

    def __init__(self, config: Config, suite: SuiteConfig) -> None:
        self._sampler, self._suite = config.sampler, suite
        self._loaded: dict[str, ChoiceLikelihood | SentenceEncoder] = {}

    @property
    def tokens(self) -> int:
        """Tokens that all models have read so far."""
        return sum(model.tokens for model in self._loaded.values())

    def key(self, name: str) -> list[object]:
        """Return a JSON value that identifies a rival with its model and prompt."""
        if RIVALS[name].model == "llm":
            return [name, self._sampler.model, self._sampler.prompt.model_dump(mode="json")]
        return [name, EMBEDDING_MODEL]

    def compute(self, name: str) -> Callable[[str, Sequence[Row]], list[Floats]]:
        """Return the function that computes the numbers of a rival for the rows of a task."""

        def compute(task: str, unit: Sequence[Row]) -> list[Floats]:
            texts = [[each["response"] for each in row["candidates"]] for row in unit]
            return rank_rows(name, self._model(RIVALS[name].model), [row["instruction"] for row in unit], texts)

        return compute

    def _model(self, kind: str) -> ChoiceLikelihood | SentenceEncoder:
        if kind not in self._loaded:
            llm = kind == "llm"
            self._loaded[kind] = ChoiceLikelihood(self._sampler, self._suite.neutral_prompt) if llm else SentenceEncoder(EMBEDDING_MODEL)
        return self._loaded[kind]
