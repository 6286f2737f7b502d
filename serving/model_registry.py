"""What a request's `model` may be: the LLM with a scorer, the LLM alone, a scorer alone. Pure: no Ray, no web server.

With the names of the defaults and a scorer `tense` beside the main one:

| name | answers | scores, ranks, classifies |
| --- | --- | --- |
| cappy | the LLM and the main scorer | the main scorer |
| cappy+tense | the LLM and `tense` | `tense` |
| cappy-llm | the LLM alone | |
| cappy-scorer | | the main scorer |
| tense | | `tense` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster import models
from cluster.config import Config, ServingConfig, check_names
from cluster.errors import UsageError
from serving.backend import ApiError
from serving.completions_api import SampleRequest
from serving.responses import Model, ModelParts
from training import adapted_index

# A server may have a scorer for each of hundreds of tasks.
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class ServedModel:
    """What stands behind a name."""

    llm: bool
    scorer: str | None


class ModelRegistry:
    """The models of a server, by name; `further` are the scorers beside the main one."""

    def __init__(self, serving: ServingConfig, further: Sequence[str] = ()) -> None:
        self.scorers = (serving.scorer_name, *further)
        self.models = {serving.pair(scorer): ServedModel(True, scorer) for scorer in self.scorers}
        self.models[serving.llm_name] = ServedModel(True, None)
        self.models |= {scorer: ServedModel(False, scorer) for scorer in self.scorers}

    def describe(self, name: str, created: int) -> Model:
        """Return OpenAI's description of a model, with what stands behind it under `cappy`; `created` is a Unix time."""
        served = self._find(name, list(self.models))
        return Model(id=name, created=created, owned_by="cappy-ray", cappy=ModelParts(llm=served.llm, scorer=served.scorer))

    def find_selection_scorer(self, request: SampleRequest) -> str | None:
        """Return the scorer that chooses among a request's candidates, `cappy.scorer` before the one of `model`; None is none.

        Raises `ApiError`: 404 for a name that is not served or has no LLM, 400 for what wants a score where nothing scores.
        """
        served = self._find(request.model, [name for name, each in self.models.items() if each.llm])
        asked = request.cappy.scorer
        for name in ("min_score", "min_gain", "target_score") if asked is None and served.scorer is None else ():
            if (value := getattr(request.cappy, name)) is not None:
                raise ApiError(
                    f"cappy.{name}={value:g} wants a score, and model={request.model!r} is the LLM alone; "
                    f"name a scorer in cappy.scorer, or leave it out",
                    param=f"cappy.{name}",
                    code="invalid_value",
                )
        if asked is None:
            return served.scorer
        if asked not in self.scorers:
            raise _unknown("cappy.scorer", asked, self.scorers)
        return asked

    def find_scorer(self, model: str) -> str:
        """Return the scorer of a request that scores, ranks or classifies. Raises `ApiError` (404) where `model` has none."""
        scorer = self._find(model, [name for name, each in self.models.items() if each.scorer]).scorer
        assert scorer is not None
        return scorer

    def _find(self, name: str, known: Sequence[str]) -> ServedModel:
        if name not in known:
            raise _unknown("model", name, known)
        return self.models[name]


def _unknown(param: str, name: str, known: Sequence[str]) -> ApiError:
    shown = ", ".join(known[:_NAMES_SHOWN]) + (
        f" and {len(known) - _NAMES_SHOWN} more, see /v1/models" if len(known) > _NAMES_SHOWN else ""
    )
    return ApiError(f"{param}={name[:80]!r} is not served here; known: {shown}", 404, param=param, code="model_not_found")


def additional_scorers(config: Config) -> dict[str, str]:
    """Return where each scorer beside the main one is, by its name: `serving.scorers`, and with `serving.adapted` the tasks' own.

    Raises `UsageError` where two models would have one name, `CappyError` where `cappy adapt` has not run.
    """
    named = [(scorer.name, models.absolute(scorer.path)) for scorer in config.serving.scorers]
    if config.serving.adapted:
        named += [(each.task, models.absolute(each.uri)) for each in adapted_index.read_published(config.adapted_uri, "serving.adapted")]
    try:
        check_names(config.serving, [name for name, _ in named])
    except ValueError as error:
        raise UsageError(f"serving: {error}") from None
    return dict(named)
