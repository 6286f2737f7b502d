"""The steps that make the scorer of the package, on a small set with a tiny encoder."""

import json

import pytest

from cappy import pretrain
from cluster import models, packed_scorer
from cluster.config import load
from cluster.errors import CappyError
from generation import candidate_file, generate
from generation.dataset import RegressionSet
from tests.generation.fixed_llm import FixedLLM
from tests.generation.made_set import publish
from tests.training.conftest import write_family
from training.scorer import Scorer


def test_the_config_of_the_scorer_of_the_package_loads_and_needs_no_llm():
    config = load(pretrain.CONFIG)
    assert config.generate.reuse_only and config.sampler.max_tokens_from == "references"
    assert sum(decoding.n for decoding in config.sampler.decodings) == 8
    assert config.scorer.encoder == "minilm-l6" and config.adapt_base is None


def test_a_set_without_the_held_out_datasets_is_refused(tmp_path):
    publish(f"{tmp_path}/set")
    with pytest.raises(CappyError, match=r"has no rows of common_gen, cosmos_qa, glue_mrpc, .*; use the set of cappy-minilm\.yaml"):
        pretrain.held_out_rows(RegressionSet(f"{tmp_path}/set"))


class HalfRightLLM(FixedLLM):
    """Gives the right response in every second draw of a decoding."""

    async def sample(self, token_ids, decoding, seed, request_id):
        number = bytes(token_ids).decode().split()[-1]
        found = await super().sample(token_ids, decoding, seed, request_id)
        return [{**each, "response": f"number {number}" if draw % 2 else each["response"]} for draw, each in enumerate(found)]


@pytest.fixture
def config(tmp_path):
    """Return the config with small rows of all held-out datasets and of two others, and a tiny encoder."""
    names = [*pretrain.HELD_OUT, "kept_a", "kept_b"]
    rows = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": names[n % len(names)]} for n in range(90)]
    rows += [{"instruction": f"yes? {n}", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "kept_a"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_family("Bert", tmp_path / "encoder")
    settings = [
        f"workspace={tmp_path}/run",
        f"source={{kind: files, path: '{tmp_path}/rows.jsonl', validation_fraction: 0.3}}",
        f"scorer={{encoder: '{tmp_path}/encoder', max_length: 32}}",
        "training={epochs: 1, batch_size: 16, window: 64, blend_rows: 0, selection_share: 0.5}",
        "evaluation.resamples=100",
    ]
    sampled = load(pretrain.CONFIG, [*settings, f"workspace={tmp_path}/sampled", "generate.reuse=[]", "generate.reuse_only=false"])
    generate.run_generate(sampled, load=HalfRightLLM)
    candidate_file.write_candidate_file(f"{tmp_path}/candidates.parquet", [sampled.dataset_uri])
    return load(pretrain.CONFIG, [*settings, f"generate.reuse=[{tmp_path}/candidates.parquet]"])


@pytest.mark.slow
def test_the_steps_pack_a_scorer_with_its_selection_and_card_and_a_second_run_repeats_nothing(ray_here, config, tmp_path, capsys):
    first = pretrain.make_scorer(config, tmp_path / "packed")
    assert {file.name for file in (tmp_path / "packed").iterdir()} == {
        *("config.json", "delta.safetensors", "pack.json", "README.md", "selection.json")
    }
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "python -m cappy.pretrain" in card and "kept_a" in card and config.workspace not in card
    before = {file.name: file.read_bytes() for file in (tmp_path / "packed").iterdir()}
    capsys.readouterr()
    assert pretrain.make_scorer(config, tmp_path / "packed") == first
    assert capsys.readouterr().err.count("is finished and kept") == 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "packed").iterdir()} == before
    (tmp_path / "whole").mkdir()
    packed_scorer.unpack(tmp_path / "packed", models.resolve(config.scorer.encoder, "scorer.encoder"), tmp_path / "whole")
    pair = ["say 1"], ["number 1"]
    assert Scorer.load(str(tmp_path / "whole")).score(*pair) == pytest.approx(Scorer.load(config.scorer_uri).score(*pair), abs=0.05)


@pytest.mark.slow
def test_the_twin_trains_without_the_held_out_datasets_and_is_evaluated_on_them_alone(ray_here, config):
    result = pretrain.make_twin(config)
    twin = RegressionSet(f"{config.workspace}/held-out/dataset")
    datasets = {split: {row["dataset"] for table in twin.batches(split) for row in table.to_pylist()} for split in ("train", "validation")}
    assert datasets == {"train": {"kept_a", "kept_b"}, "validation": set(pretrain.HELD_OUT)}
    assert twin.manifest["resplit_from"]["held_out"] == list(pretrain.HELD_OUT) and result["instructions"] > 0

    part = pretrain.make_twin(config, 0.5)
    smaller = RegressionSet(f"{config.workspace}/held-out-0.5/dataset")
    ids = [{row["id"] for table in each.batches("train") for row in table.to_pylist()} for each in (smaller, twin)]
    assert ids[0] < ids[1] and smaller.rows("validation") == twin.rows("validation") and part["instructions"] == result["instructions"]
    assert smaller.manifest["resplit_from"]["train_share"] == 0.5


def test_a_larger_share_has_the_rows_of_a_smaller_one_and_all_held_out_rows():
    held_out = {f"row {n}": n % 5 == 0 for n in range(1000)}
    quarter, half, whole = (pretrain.choose_share(held_out, share, 7) for share in (0.25, 0.5, 1.0))
    assert set(quarter) < set(half) < set(whole) == set(held_out)
    assert all(sum(part.values()) == 200 for part in (quarter, half, whole))
    assert 150 < len(quarter) - 200 < 250 and 350 < len(half) - 200 < 450


@pytest.mark.parametrize(
    "arguments", [["--train-share", "0.5"], *(["--held-out", "--train-share", share] for share in ("0", "2", "nan", "half"))]
)
def test_a_share_outside_its_range_or_without_a_twin_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(arguments)
    error = capsys.readouterr().err
    assert "--train-share" in error and ("give for example 0.25" in error or "trains on all rows" in error)
