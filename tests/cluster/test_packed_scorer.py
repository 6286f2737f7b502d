"""Packed scorers: their weights are the weights of an encoder plus a low-rank difference."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from cluster import models, packed_scorer
from cluster.config import Config, load
from cluster.config.paths import absolute
from cluster.errors import CappyError, UsageError

ENCODER = {"layer.weight": np.arange(12, dtype=np.float32).reshape(4, 3), "layer.bias": np.ones(4, np.float32)}
DELTA = {
    "bert.layer.weight.left": np.array([[1], [2], [0], [-1]], np.int8),
    "bert.layer.weight.scale": np.array([0.5], np.float32),
    "bert.layer.weight.right": np.array([[2, 0, 4]], np.int8),
    "bert.layer.bias.delta": np.full(4, 0.25, np.float32),
    "classifier.weight.delta": np.array([[1.0, 2.0, 3.0]], np.float32),
}


def test_the_weights_are_the_encoder_plus_the_difference_and_the_head_is_new():
    found = packed_scorer.add_delta(ENCODER, DELTA)
    expected = ENCODER["layer.weight"] + [[1, 0, 2], [2, 0, 4], [0, 0, 0], [-1, 0, -2]]
    assert found.keys() == {"bert.layer.weight", "bert.layer.bias", "classifier.weight"}
    np.testing.assert_array_equal(found["bert.layer.weight"], expected)
    np.testing.assert_array_equal(found["bert.layer.bias"], np.full(4, 1.25))
    np.testing.assert_array_equal(found["classifier.weight"], [[1, 2, 3]])


@pytest.fixture
def folders(tmp_path):
    """Return the folders of an encoder and of a packed scorer."""
    encoder, packed = tmp_path / "encoder", tmp_path / "packed"
    encoder.mkdir()
    packed.mkdir()
    (encoder / "model.safetensors").write_bytes(save(ENCODER))
    (encoder / "tokenizer_config.json").write_text('{"model_max_length": 512, "do_lower_case": true}')
    (encoder / "vocab.txt").write_text("a\nb\n")
    (packed / "delta.safetensors").write_bytes(save(DELTA))
    facts = {"encoder": "made-up", "encoder_sha256": packed_scorer.sha256(encoder / "model.safetensors"), "max_length": 128}
    (packed / "pack.json").write_text(json.dumps(facts))
    (packed / "config.json").write_text("{}")
    (packed / "selection.json").write_text("{}")
    return encoder, packed


def test_an_unpacked_scorer_has_the_files_of_a_model_and_its_length_limit(folders, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    packed_scorer.unpack(folders[1], folders[0], target)
    assert {file.name for file in target.iterdir()} == {
        *("model.safetensors", "tokenizer_config.json", "vocab.txt", "config.json", "selection.json")
    }
    assert load_file(target / "model.safetensors").keys() == packed_scorer.add_delta(ENCODER, DELTA).keys()
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"model_max_length": 128, "do_lower_case": True}


def test_an_encoder_with_other_weights_is_refused(folders, tmp_path):
    (folders[0] / "model.safetensors").write_bytes(save({**ENCODER, "layer.bias": np.zeros(4, np.float32)}))
    with pytest.raises(CappyError, match=r"packed: the weights of its encoder made-up have SHA-256 [0-9a-f]{12}, not [0-9a-f]{12}"):
        packed_scorer.unpack(folders[1], folders[0], tmp_path)


def test_another_file_gives_another_version(folders):
    before = packed_scorer.version(folders[1])
    (folders[1] / "selection.json").write_text('{"version": 1}')
    assert packed_scorer.version(folders[1]) != before


def test_adapt_starts_from_the_scorer_of_the_package_unless_a_base_or_an_encoder_is_given():
    def base(*overrides):
        config = load(None, list(overrides))
        # A job of a cluster gets the dumped config.
        again = absolute(Config.model_validate(absolute(config).model_dump(mode="json")))
        assert absolute(config).adapt.base == again.adapt.base == config.adapt_base
        return config.adapt_base

    assert base() == base("adapt.method=lora") == base("scorer.max_length=64") == "cappy-minilm"
    assert base("scorer.encoder=minilm-l6") is None
    assert base("adapt.base=null") is None
    assert base("adapt.base=my/scorer") == "my/scorer"
    assert Config().adapt.base is None
    with pytest.raises(UsageError, match=r"adapt\.method=lora with base=null"):
        load(None, ["adapt.method=lora", "scorer.encoder=minilm-l6"])


def test_the_name_of_the_scorer_is_not_made_a_path():
    config = absolute(load(None, ["scorer_path=cappy-minilm"]))
    assert config.scorer_path == config.adapt.base == "cappy-minilm"
    assert "cappy-minilm" in models.EMBEDDED
