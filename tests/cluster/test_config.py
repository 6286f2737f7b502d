import pytest

from cluster.config import CONFIG_FOLDER, Config, differences, fingerprint, load
from cluster.errors import UsageError


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load(None, ["training.epochs=7", "source={kind: files, path: data.jsonl}", "sampler.decodings.0.max_tokens=9"][:2])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config
    assert config.training.epochs == 7


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
def test_every_config_in_the_folder_loads_by_name(name):
    assert load(name).workspace


def test_an_override_reaches_into_a_list_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("sampler: {decodings: [{name: greedy, temperature: 0}, {name: warm, n: 2}]}")
    config = load(tmp_path / "c.yaml", ["sampler.decodings.1.n=5"])
    assert [each.n for each in config.sampler.decodings] == [1, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "unknown key training.epoch; did you mean 'epochs'?"),
        (["trainin.epochs=3"], "unknown key trainin; did you mean 'training'?"),
        (["source={kind: files, path: x, pth: y}"], "unknown key source.pth; did you mean 'path'?"),
        (["sampler.decodings=[{name: a, temprature: 1}]"], "unknown key sampler.decodings.0.temprature; did you mean 'temperature'?"),
        (["training.epochs=many"], "training.epochs='many': Input should be a valid integer"),
        (["training.batch_size=3", "training.workers=4"], "batch_size=3 is below workers=4; use a multiple of it"),
        (["sampler.decodings=[{name: a, n: 3, temperature: 0}]"], "n=3 with temperature=0 draws the same candidate 3 times"),
        (["sampler.decodings=[{name: a}, {name: a}]"], "decoding names must differ"),
        (["training"], "write it as section.key=value"),
        (["seed=3", "seed.x=1"], "--set seed.x=1: seed holds a plain value"),
        (["sampler.engine={kind: vlm}"], "does not match any of the expected tags: 'vllm', 'transformers', 'endpoint'"),
        (["sampler.engine={kind: transformers, max_model_len: 9}"], "unknown key sampler.engine.max_model_len; valid keys: batch_tokens"),
        (["sampler.decodings=[{name: b, temperature: 0, beams: 4}]"], "'b' has beams=4, which engine.kind=vllm does not"),
        (["sampler.decodings=[{name: b, beams: 4}]"], "beams=4 with temperature=1 and n=1: use temperature=0 and at most n=4"),
        (["sampler.engine={kind: endpoint, base_url: 'localhost:80'}"], "base_url is not an http:// or https:// address"),
        (["sampler.engine={kind: endpoint, base_url: 'http://h/v1', max_cost: 1}"], "need both price_per_million_prompt and"),
        (["sampler.replicas=2", "sampler.engine={kind: endpoint, base_url: 'http://h/v1'}"], "replicas=2 would each have separate"),
        (["serving.candidates=100", "serving.max_candidates=50"], "candidates=100 is above max_candidates=50"),
        (["source={kind: hub, name: a/b, revision: main}"], "source.revision='main': String should match pattern"),
        (["source={kind: files, path: x, format: promptsource}"], "format=promptsource with templates=None"),
        (
            ["source={kind: mixture, parts: [{source: {kind: files, path: x, pth: y}}]}"],
            "unknown key source.parts.0.source.pth; did you mean 'path'?",
        ),
        (
            ["source={kind: mixture, policy: weights, parts: [{source: {kind: files, path: x}}]}"],
            "parts.0.weight=None with policy=weights: give each part a weight with policy=weights",
        ),
        (
            ["source={kind: mixture, rows: 9, parts: [{source: {kind: files, path: x}}]}"],
            "rows=9 needs policy=weights, not concatenate; use `limit` of a source",
        ),
    ],
)
def test_an_invalid_setting_is_named_with_its_value_and_the_fix(overrides, message):
    with pytest.raises(UsageError) as caught:
        load(None, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-abc123", "abc123", "https://u:p@h"])
def test_an_error_does_not_print_a_key_that_is_in_the_config_by_mistake(key):
    settings = "base_url: 'http://h/v1', api_key_env" if "://" not in key else "base_url"
    with pytest.raises(UsageError, match=r"give the name, never the key|without user") as caught:
        load(None, [f"sampler.engine={{kind: endpoint, {settings}: '{key}'}}"])
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "pool"),
    [
        ("{max_model_len: 512}", ["greedy", *["sample"] * 4, *["temperature"] * 4, *["top-k"] * 4, *["top-p"] * 4]),
        ("{kind: transformers}", ["beam", *["sample"] * 4, *["temperature"] * 4, *["top-k"] * 4, *["top-p"] * 4]),
        ("{kind: endpoint, base_url: 'http://h/v1'}", ["greedy", *["sample"] * 4, *["temperature"] * 4, *["top-p"] * 4]),
    ],
)
def test_the_default_decodings_are_those_of_the_paper_that_the_engine_supports(engine, pool, tmp_path):
    config = load(None, [f"sampler.engine={engine}"])
    assert [each.name for each in config.sampler.decodings for _ in range(each.n)] == pool
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "is not YAML at line"), ("- a", "holds a list"), (None, "does not exist; give a path or one of: ")]
)
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load(path)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


def test_the_fingerprint_changes_with_any_value_and_only_then():
    one, two = load(None, ["training.epochs=2"]), load(None, ["training.epochs=3"])
    assert fingerprint(one) == fingerprint(load(None, ["training.epochs=2"])) != fingerprint(two)
    assert differences(one.model_dump(mode="json"), two.model_dump(mode="json")) == ["training.epochs: 2 -> 3"]


def test_outputs_are_found_below_the_workspace_unless_named():
    config = load(None, ["workspace=s3://b/w/", "scorer_path=/models/s"])
    assert (config.dataset_uri, config.scorer_uri) == ("s3://b/w/dataset", "/models/s")
