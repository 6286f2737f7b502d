"""Names of models and locations of scorers, from the config and from `cappy adapt`."""

import json

import pytest

from cluster import storage
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError, UsageError
from serving.backend import ApiError
from serving.completions_api import parse_chat_request
from serving.model_registry import ModelRegistry, additional_scorers


def config(workspace, **serving):
    return Config(workspace=str(workspace), serving=ServingConfig(**serving))


def test_additional_scorers_come_from_the_config_and_from_adapted_tasks(tmp_path):
    tasks = [
        {"task": "tense", "dataset": "tense", "uri": "/elsewhere/adapted/tense"},
        {"task": "hard", "dataset": "hard", "uri": None},
    ]
    storage.write_json(f"{tmp_path}/adapted/results.json", {"tasks": tasks})
    (tmp_path / "adapted" / "tense").mkdir()
    named = [{"name": "big", "path": "owner/scorer"}]
    assert additional_scorers(config(tmp_path, scorers=named)) == {"big": "owner/scorer"}
    both = {"big": "owner/scorer", "tense": f"{tmp_path}/adapted/tense"}
    assert additional_scorers(config(tmp_path, scorers=named, adapted=True)) == both
    with pytest.raises(UsageError, match="serving: scorers and scorers are both 'tense'; give each a different name"):
        additional_scorers(config(tmp_path, scorers=[{"name": "tense", "path": "x"}], adapted=True))
    with pytest.raises(CappyError, match=r"serving\.adapted=true: there is no .*results\.json; run `cappy adapt` first"):
        additional_scorers(config(tmp_path / "other", adapted=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorers": ["cappy-scorer"]}, "scorer_name and scorers are both 'cappy-scorer'"),
        ({"scorers": ["x", "cappy+x"]}, "scorers and a pair are both 'cappy+x'"),
        ({"llm_name": "cappy"}, "model_name and llm_name are both 'cappy'"),
    ],
)
def test_two_models_with_the_same_name_are_refused(settings, message):
    scorers = [{"name": name, "path": "x"} for name in settings.pop("scorers", ())]
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        ServingConfig(scorers=scorers, **settings)


REGISTRY = ModelRegistry(ServingConfig(), ["tense"])


def request(model, **options):
    return parse_chat_request(json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "cappy": options}).encode())


@pytest.mark.parametrize(
    ("model", "options", "scorer"),
    [
        ("cappy", {}, "cappy-scorer"),
        ("cappy+tense", {}, "tense"),
        ("cappy-llm", {}, None),
        ("cappy-llm", {"scorer": "tense", "min_score": 0.5}, "tense"),
        ("cappy", {"scorer": "tense"}, "tense"),
    ],
)
def test_the_scorer_of_a_completion_is_that_of_the_model_unless_the_request_names_one(model, options, scorer):
    assert REGISTRY.find_selection_scorer(request(model, **options)) == scorer


@pytest.mark.parametrize(
    ("model", "options", "status", "param"),
    [
        ("tense", {}, 404, "model"),
        ("other", {}, 404, "model"),
        ("cappy", {"scorer": "other"}, 404, "cappy.scorer"),
        ("cappy-llm", {"min_score": 0.5}, 400, "cappy.min_score"),
        ("cappy-llm", {"target_score": 0.5}, 400, "cappy.target_score"),
    ],
)
def test_a_completion_by_an_unknown_model_or_without_a_needed_scorer_is_refused(model, options, status, param):
    with pytest.raises(ApiError) as caught:
        REGISTRY.find_selection_scorer(request(model, **options))
    assert (caught.value.status, caught.value.param) == (status, param)


@pytest.mark.parametrize(
    ("model", "scorer"), [("cappy", "cappy-scorer"), ("cappy-scorer", "cappy-scorer"), ("cappy+tense", "tense"), ("tense", "tense")]
)
def test_a_model_with_a_scorer_scores_and_the_llm_alone_does_not(model, scorer):
    assert REGISTRY.find_scorer(model) == scorer
    with pytest.raises(ApiError) as caught:
        REGISTRY.find_scorer("cappy-llm")
    assert caught.value.status == 404


def test_an_error_lists_a_few_of_many_names():
    many = ModelRegistry(ServingConfig(), [f"task-{number}" for number in range(100)])
    with pytest.raises(ApiError, match=r"model='x' is not served here; use one of: cappy, .* and \d+ more, see /v1/models") as caught:
        many.find_scorer("x")
    assert len(str(caught.value)) < 300


def test_a_description_names_the_llm_and_the_scorer_of_a_model():
    assert REGISTRY.describe("cappy+tense", created=7).model_dump()["cappy"] == {"llm": True, "scorer": "tense"}
    assert REGISTRY.describe("cappy-llm", created=7).model_dump()["cappy"] == {"llm": True, "scorer": None}
    assert REGISTRY.describe("tense", created=7).model_dump()["cappy"] == {"llm": False, "scorer": "tense"}
