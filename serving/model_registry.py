"""The models of a server by the name in a request's `model`: the LLM with a scorer, the LLM alone, a scorer alone.

Imports neither Ray nor a web framework. With the default names and an additional scorer `tense`:

| name | completions | scoring, ranking, classification |
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

# An error lists at most this many names: a server may have a scorer for each of hundreds of tasks.
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class ServedModel:
    """A model of a server."""

    llm: bool
    """Whether the model samples responses."""
    scorer: str | None
    """The name of its scorer."""


class ModelRegistry:
    """The models of a server, by name; `additional` holds the names of the scorers beside the main scorer."""

    def __init__(self, serving: ServingConfig, additional: Sequence[str] = ()) -> None:
        self.scorers = (serving.scorer_name, *additional)
        self.models = {serving.pair(scorer): ServedModel(True, scorer) for scorer in self.scorers}
        self.models[serving.llm_name] = ServedModel(True, None)
        self.models |= {scorer: ServedModel(False, scorer) for scorer in self.scorers}

    def describe(self, name: str, created: int) -> Model:
        """Return the model in OpenAI's format, with its LLM and scorer under `cappy`; `created` is a Unix time in seconds."""
        served = self._find(name, list(self.models))
        return Model(id=name, created=created, owned_by="cappy-ray", cappy=ModelParts(llm=served.llm, scorer=served.scorer))

    def find_selection_scorer(self, request: SampleRequest) -> str | None:
        """Return the name of the scorer that ranks a request's candidates, or None for the LLM alone.

        `cappy.scorer` takes precedence over the scorer of `model`.

        Raises `ApiError`: 404 for a name that is not served or has no LLM, 400 for an option that needs a scorer when there is none.
        """
        served = self._find(request.model, [name for name, each in self.models.items() if each.llm])
        requested = request.cappy.scorer
        for name in ("min_score", "min_gain", "target_score") if requested is None and served.scorer is None else ():
            if (value := getattr(request.cappy, name)) is not None:
                raise ApiError(
                    f"cappy.{name}={value:g} needs a scorer, and model={request.model!r} is the LLM alone; "
                    f"set cappy.scorer, or remove cappy.{name}",
                    param=f"cappy.{name}",
                    code="invalid_value",
                )
        if requested is None and served.scorer is None and request.cappy.selection in ("score", "blend", "fitted"):
            raise ApiError(
                f"cappy.selection={request.cappy.selection} needs a scorer, and model={request.model!r} is the LLM alone; "
                f"set cappy.scorer, or use consensus",
                param="cappy.selection",
                code="invalid_value",
            )
        if requested is None:
            return served.scorer
        if requested not in self.scorers:
            raise _not_served("cappy.scorer", requested, self.scorers)
        return requested

    def find_scorer(self, model: str) -> str:
        """Return the name of the scorer for a request that scores, ranks or classifies. Raises `ApiError` (404) if `model` has none."""
        scorer = self._find(model, [name for name, each in self.models.items() if each.scorer]).scorer
        assert scorer is not None
        return scorer

    def _find(self, name: str, known: Sequence[str]) -> ServedModel:
        if name not in known:
            raise _not_served("model", name, known)
        return self.models[name]


def _not_served(param: str, name: str, known: Sequence[str]) -> ApiError:
    shown = ", ".join(known[:_NAMES_SHOWN]) + (
        f" and {len(known) - _NAMES_SHOWN} more, see /v1/models" if len(known) > _NAMES_SHOWN else ""
    )
    return ApiError(f"{param}={name[:80]!r} is not served here; use one of: {shown}", 404, param=param, code="model_not_found")


def additional_scorers(config: Config) -> dict[str, str]:
    """Return the locations of the additional scorers, by name: `serving.scorers`, and with `serving.adapted` those of `cappy adapt`.

    Raises `UsageError` if two models would have the same name, `CappyError` if `cappy adapt` has not run.
    """
    named = [(scorer.name, models.absolute(scorer.path)) for scorer in config.serving.scorers]
    if config.serving.adapted:
        named += [(each.task, models.absolute(each.uri)) for each in adapted_index.read_published(config.adapted_uri, "serving.adapted")]
    try:
        check_names(config.serving, [name for name, _ in named])
    except ValueError as error:
        raise UsageError(f"serving: {error}") from None
    return dict(named)
