"""The configs in `cappy/configs/`: they load, and name nothing beside the repository."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CONFIG_FOLDER, BigBenchSource, HubSource, MixtureSource, load
from generation import plan
from generation.cost_model import Count, estimate_plan
from generation.sources.reader import read_rows

CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"cappy-minilm"}))
def test_each_shipped_config_reads_public_packages_and_datasets_only(name):
    source = load(name).source
    parts = [part.source for part in source.parts] if isinstance(source, MixtureSource) else [source]
    assert parts and all(isinstance(part, BigBenchSource | HubSource) for part in parts)


def test_the_pretraining_reads_a_file_whose_origin_its_config_names():
    assert load("cappy-minilm").source.path == "data/t0_train.parquet"
    assert "https://github.com/yizhongw/self-instruct" in (CONFIG_FOLDER / "cappy-minilm.yaml").read_text()


def test_t0_names_one_template_of_each_of_its_38_datasets_at_one_commit():
    source = load("t0").source
    parts = [part.source for part in source.parts]
    assert (source.policy, source.cap, len(parts)) == ("t0", 130, 38)
    assert {(part.name, part.split, part.format, part.split_by) for part in parts} == {("bigscience/P3", "train", "p3", "dataset")}
    assert len({part.revision for part in parts}) == 1 and None not in {part.revision for part in parts}
    assert len({part.dataset for part in parts}) == len({part.data_dir for part in parts}) == 38
    assert all(part.data_dir.startswith(part.dataset + "_") for part in parts)


def local_copy(source, folder, names):
    """Return a mixture of some parts, with a folder instead of the hub. The same library reads it, in the layout of the hub's copy."""
    some = [part for part in source.parts if part.source.dataset in names]
    for part in some:
        rows = [
            {"inputs": [3, 1], "inputs_pretokenized": f"{part.source.dataset} question {n}", "targets_pretokenized": f"\nanswer {n}"}
            for n in range(40)
        ]
        if part.source.dataset == "qasc":
            rows = [{**row, "answer_choices": [f"answer {n}", "trolley"]} for n, row in enumerate(rows)]
        (folder / part.source.data_dir / "train").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / part.source.data_dir / "train" / "0000.parquet")
    local = [part.model_copy(update={"source": part.source.model_copy(update={"name": str(folder), "revision": None})}) for part in some]
    return source.model_copy(update={"parts": tuple(local)})


@pytest.mark.parametrize(("model", "parameters"), [("yuchenlin/BART0", "0.406G"), ("bigscience/T0_3B", "3G")])
def test_cappy_large_has_the_mixture_of_t0_and_a_plan_with_each_generator(model, parameters, tmp_path):
    """The plan reads a local folder instead of P3 on the hub, which tests cannot reach."""
    config = load("cappy-large", [f"sampler.model={model}"])
    assert {part.source.data_dir for part in config.source.parts} == {part.source.data_dir for part in load("t0").source.parts}
    config = config.model_copy(update={"source": local_copy(config.source, tmp_path, ("qasc", "xsum", "common_gen"))})
    result = plan.run_plan(config)
    totals = result["totals"]
    assert (totals["instructions"], totals["sampled_instructions"], totals["candidates"]) == (120, 80, 17 * 80)
    sampled = next(each["from"] for each in result["assumptions"] if each["what"] == "sampled tokens/s of a replica")
    assert "1 H100 from the memory traffic, " in sampled and f"half of {parameters} parameters" in sampled
    assert result["training"]["pairs"] == pytest.approx(totals["pairs"], rel=0.05) and result["compute"]["gpu"] == "H100"


def test_the_training_estimate_of_cappy_large_is_that_of_160_million_pairs():
    """The source states 6.5e19 FLOP and 18 hours at the peak of an H200, for pairs of 190.6 tokens whose lengths differ."""
    config = load("cappy-large", ["plan.gpu=H200"])
    rows = 160_000_000 // 19
    counts = {"all": Count(train=rows, sampled_rows=rows, references=rows, sampled_references=rows)}
    counts["all"].prompt_tokens, counts["all"].reference_tokens = 175 * rows, 13 * rows
    training = estimate_plan(counts, config, plan.find_rates(config))["training"]
    assert training["pairs"] == pytest.approx(160e6, rel=0.001) and training["tokens_per_pair"] == pytest.approx(190.6, rel=0.01)
    assert training["flops"] == pytest.approx(6.5e19, rel=0.2) and training["gpu_hours"] == pytest.approx(36, rel=0.2)


def test_t0_reads_a_copy_of_p3_on_disk_with_its_columns_and_choices(tmp_path):
    """A folder replaces the hub. The same library reads it, in the layout of the hub's Parquet copy."""
    source = load("t0").source
    some = [part for part in source.parts if part.source.dataset in ("qasc", "xsum")]
    for part in some:
        rows = [
            {"inputs": [3, 1], "inputs_pretokenized": f"{part.source.dataset} question {n}", "targets_pretokenized": "\nsafe"}
            for n in range(250)
        ]
        if part.source.dataset == "qasc":
            rows = [{**row, "answer_choices": ["safe", "trolley"]} for row in rows]
        folder = tmp_path / part.source.data_dir / "train"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet")
    local = [part.model_copy(update={"source": part.source.model_copy(update={"name": str(tmp_path), "revision": None})}) for part in some]
    rows = list(read_rows(source.model_copy(update={"parts": tuple(local)}), seed=1))
    assert [row.dataset for row in rows] == ["qasc"] * 130 + ["xsum"] * 130
    assert {row.answer_choices for row in rows[:130]} == {("safe", "trolley")}
    assert {row.answer_choices for row in rows[130:]} == {None}
    assert max(int(row.instruction.split()[-1]) for row in rows) < 200
