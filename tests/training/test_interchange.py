from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from transformers import AutoConfig

from benchmarks import interchange
from cluster.config import Config, ScorerConfig, TrainingConfig
from serving.serve import check_scorer
from training.scorer import Scorer, load_tokenizer, new_model

INSTRUCTIONS = ["say after me red fox", "please say a dog", "now", "say after me then once again the blue bee", "cow"]
RESPONSES = ["a red fox", "dog", "the owl again please", "blue", "now then"]


def test_the_exported_folder_gives_the_same_scores_in_transformers(encoder: Path, tmp_path: Path):
    model = new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=3)
    model.config.cappy = {"blend": {"logprob_weight": 0.05}}
    Scorer(model, load_tokenizer(encoder, "x", "s"), 64).save(tmp_path)
    found = interchange.compare(tmp_path, INSTRUCTIONS, RESPONSES, without=["crossencoder", "vllm"])
    assert found["pairs"] == 5 and found["score_std"] > 0 and found["transformers_max_diff"] < 1e-6
    assert AutoConfig.from_pretrained(tmp_path).cappy == {"blend": {"logprob_weight": 0.05}}
    assert Scorer.load(str(tmp_path)).logprob_weight == 0.05


@pytest.mark.skipif(not find_spec("sentence_transformers"), reason="needs the extra `bench`")
def test_the_exported_folder_gives_the_same_scores_in_a_cross_encoder(encoder: Path, tmp_path: Path):
    Scorer(new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=3), load_tokenizer(encoder, "x", "s"), 64).save(tmp_path)
    found = interchange.compare(tmp_path, INSTRUCTIONS, RESPONSES, without=["transformers", "vllm"])
    assert found["score_std"] > 0 and found["crossencoder_max_diff"] < 1e-6


@pytest.mark.parametrize(
    ("shape", "weights"), [("roberta-tiny", 53_921), pytest.param("roberta-large", 355_360_769, marks=pytest.mark.slow)]
)
def test_a_model_in_the_published_layout_loads_and_can_be_served_and_trained(shape: str, weights: int):
    with TemporaryDirectory() as folder:  # pytest would keep the large folder for days
        interchange.write_published_layout(Path(folder), interchange.SHAPES[shape], INSTRUCTIONS + RESPONSES)
        found = interchange.compare(Path(folder), INSTRUCTIONS, RESPONSES, without=["crossencoder", "vllm"])
        assert found["pairs"] == 5 and found["score_std"] > 0 and found["transformers_max_diff"] < 1e-6
        scorer = Scorer.load(folder)
        assert scorer.max_length == 512 and scorer.logprob_weight is None
        assert sum(each.numel() for each in scorer.model.parameters()) == weights
        check_scorer(Config.model_validate({"scorer_path": folder}))
        new_model(Path(folder), ScorerConfig(encoder=folder), TrainingConfig(), seed=0)
