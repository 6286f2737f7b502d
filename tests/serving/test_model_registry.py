import pytest

from cluster import storage
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError, UsageError
from serving.model_registry import additional_scorers


def config(workspace, **serving):
    return Config(workspace=str(workspace), serving=ServingConfig(**serving))


def test_scorers_come_from_the_config_and_from_what_was_adapted(tmp_path):
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
    with pytest.raises(UsageError, match="serving: scorers and scorers are both 'tense'; give each its own"):
        additional_scorers(config(tmp_path, scorers=[{"name": "tense", "path": "x"}], adapted=True))
    with pytest.raises(CappyError, match=r"serving\.adapted=true: there is no .*results\.json; run `cappy adapt` first"):
        additional_scorers(config(tmp_path / "other", adapted=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scorers": ["cappy-scorer"]}, "scorer_name and scorers are both 'cappy-scorer'"),
        ({"scorers": ["x", "cappy+x"]}, "scorers and a pair are both 'cappy+x'"),
        ({"llm_name": "cappy"}, "model_name and llm_name are both 'cappy'"),
    ],
)
def test_no_two_models_have_one_name(settings, says):
    scorers = [{"name": name, "path": "x"} for name in settings.pop("scorers", ())]
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        ServingConfig(scorers=scorers, **settings)
