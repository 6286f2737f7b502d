"""The configs in `cappy/configs/`: they load, and name nothing beside the repository."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CONFIG_FOLDER, BigBenchSource, HubSource, MixtureSource, load
from generation.sources.reader import read_rows

CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_shipped_config_reads_public_packages_and_datasets_only(name):
    source = load(name).source
    parts = [part.source for part in source.parts] if isinstance(source, MixtureSource) else [source]
    assert parts and all(isinstance(part, BigBenchSource | HubSource) for part in parts)


def test_t0_names_one_template_of_each_of_its_38_datasets_at_one_commit():
    source = load("t0").source
    parts = [part.source for part in source.parts]
    assert (source.policy, source.cap, len(parts)) == ("t0", 130, 38)
    assert {(part.name, part.split, part.format, part.split_by) for part in parts} == {("bigscience/P3", "train", "p3", "dataset")}
    assert len({part.revision for part in parts}) == 1 and None not in {part.revision for part in parts}
    assert len({part.dataset for part in parts}) == len({part.data_dir for part in parts}) == 38
    assert all(part.data_dir.startswith(part.dataset + "_") for part in parts)


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
