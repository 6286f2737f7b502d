"""Packing a scorer: the low-rank difference within a budget, the card, and the scorer that ships with the package."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from cluster import models, packed_scorer
from cluster.errors import CappyError, UsageError
from generation.dataset import RegressionSet
from tests.generation.made_set import publish as publish_set
from tests.training.conftest import write_family
from tests.training.test_adapt_one import published_scorer
from training import pack
from training.scorer import Scorer

RANDOM = np.random.default_rng(7)


def low_rank(rows, columns, rank):
    return (RANDOM.normal(size=(rows, rank)) @ RANDOM.normal(size=(rank, columns)) / 100).astype(np.float32)


def test_a_difference_of_low_rank_is_kept_and_vectors_are_exact():
    differences = {"a.weight": low_rank(60, 30, 4), "b.weight": low_rank(20, 90, 3), "a.bias": RANDOM.normal(size=60).astype(np.float32)}
    delta, share = pack.compress(differences, 10_000)
    # As in the file: safetensors writes the memory of an array, also of one whose rows do not follow each other.
    found = packed_scorer.add_delta({}, load(save(delta)))
    assert share == pytest.approx(1.0)
    assert delta["a.weight.left"].shape == (60, 4) and delta["b.weight.right"].shape == (3, 90)
    for name in ("a.weight", "b.weight"):
        assert np.linalg.norm(found[name] - differences[name]) < 0.02 * np.linalg.norm(differences[name])
    np.testing.assert_array_equal(found["a.bias"], differences["a.bias"])


def test_the_budget_is_kept_and_goes_to_the_largest_singular_values():
    differences = {"large.weight": 10 * low_rank(50, 50, 8), "small.weight": low_rank(50, 50, 8)}
    delta, share = pack.compress(differences, 8 * 104)
    assert sum(value.nbytes for value in delta.values()) <= 8 * 104
    assert delta["large.weight.left"].shape[1] > delta["small.weight.left"].shape[1] and 0.8 < share < 1
    with pytest.raises(UsageError, match=r"--max-mb is too small"):
        pack.compress({"a.bias": np.zeros(100, np.float32)}, 100)


def test_the_card_has_no_local_path_and_no_plot():
    original = '# A scorer\n\nScorer.load("/home/me/run/scorer")\n\n![loss](loss.svg)\n\nTrained on\n5 pairs of `/home/me/run/dataset`.\n'
    facts = {"encoder": "minilm-l6", "kept_energy": 0.5, "agreement": {"pairs": 9, "mean": 0.1, "max": 0.2, "spearman": 0.99}}
    card = pack.render_card(original, "/home/me/run/scorer", "cappy-minilm", facts, "A note.")
    assert "/home/me" not in card and "svg" not in card
    assert card.startswith("# A scorer\n\nA note.\n") and 'Scorer.load("cappy-minilm")' in card
    assert "keep 50.0% of its square" in card and "0.1000 on average" in card


@pytest.mark.slow
def test_the_scorer_of_the_package_loads_by_name_scores_and_can_be_packed_again(tmp_path):
    scorer = Scorer.load("cappy-minilm", device="cpu")
    folder = models.resolve("cappy-minilm", "scorer_path")
    assert scorer.max_length == json.loads((packed_scorer.FOLDER / "cappy-minilm" / "pack.json").read_text())["max_length"]
    choice = scorer.best("What is the capital of France?", ["Paris", "a b c"])
    assert np.isfinite(choice.scores).all() and choice.response in ("Paris", "a b c")
    again = pack.pack_scorer(str(folder), tmp_path / "again", max_mb=10)
    assert again["bytes"] <= 10_000_000
    packed_scorer.unpack(tmp_path / "again", models.resolve("minilm-l6", "encoder"), tmp_path)
    other = Scorer.load(str(tmp_path), device="cpu")
    texts = ["Paris", "a b c", ""]
    np.testing.assert_allclose(other.score(["capital?"] * 3, texts), scorer.score(["capital?"] * 3, texts), atol=0.02)


@pytest.fixture
def trained(encoder, tmp_path):
    """Return a scorer whose matrices differ from the encoder by matrices of rank 2, and its URI."""
    uri = published_scorer(encoder, str(tmp_path / "scorer"))
    scorer = Scorer.load(uri, device="cpu", cpu_kernels=False)
    generator = torch.Generator().manual_seed(1)
    for weight in scorer.model.parameters():
        if weight.ndim == 2:
            factors = torch.randn(weight.shape[0], 2, generator=generator), torch.randn(2, weight.shape[1], generator=generator)
            weight.data += factors[0] @ factors[1] / 20
    scorer.save(uri)
    publish_set(f"{tmp_path}/set")
    return scorer, uri


def test_a_packed_scorer_scores_as_the_original_and_reports_the_difference(trained, encoder, tmp_path):
    scorer, uri = trained
    facts = pack.pack_scorer(uri, tmp_path / "packed", max_mb=1, dataset=f"{tmp_path}/set", encoder=str(encoder))
    assert facts["kept_energy"] == pytest.approx(1, abs=1e-5) and facts["bytes"] < 1_000_000
    assert facts["agreement"]["max"] < 0.02 and facts["agreement"]["pairs"] > 10
    (tmp_path / "whole").mkdir()
    packed_scorer.unpack(tmp_path / "packed", encoder, tmp_path / "whole")
    packed = Scorer.load(str(tmp_path / "whole"), device="cpu", cpu_kernels=False)
    texts = ["a red fox", "the blue me", ""]
    np.testing.assert_allclose(packed.score(["say after me"] * 3, texts), scorer.score(["say after me"] * 3, texts), atol=0.02)
    assert packed.max_length == scorer.max_length == 32


def test_the_bias_corrects_the_mean_of_the_scores_when_the_budget_leaves_a_difference(trained, encoder, tmp_path):
    scorer, uri = trained
    facts = pack.pack_scorer(uri, tmp_path / "packed", max_mb=0.205, dataset=f"{tmp_path}/set", encoder=str(encoder))
    assert facts["kept_energy"] < 0.9
    (tmp_path / "whole").mkdir()
    packed_scorer.unpack(tmp_path / "packed", encoder, tmp_path / "whole")
    packed = Scorer.load(str(tmp_path / "whole"), device="cpu", cpu_kernels=False)
    pairs = next(RegressionSet(f"{tmp_path}/set").pairs("train"))
    difference = scorer.score(pairs.instructions, pairs.responses) - packed.score(pairs.instructions, pairs.responses)
    bias, before = (each.model.get_parameter("classifier.bias").item() for each in (packed, scorer))
    assert abs(difference.mean()) < 1e-4 < 1e-3 < abs(bias - before)


def test_a_scorer_of_another_encoder_is_refused(encoder, tmp_path):
    uri = published_scorer(encoder, str(tmp_path / "scorer"))
    other = tmp_path / "other"
    write_family("Bert", other)
    with pytest.raises(CappyError, match=r"SCORER=.*has the shape \(\d+, 32\), and .* has \(40, 32\); give its encoder"):
        pack.pack_scorer(uri, tmp_path / "out", encoder=str(other))
