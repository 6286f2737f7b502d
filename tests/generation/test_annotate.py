import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cappy import jobs
from cappy.cli import app
from cluster import artifacts, lease, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import annotate, generate
from generation.dataset import RegressionSet, compute_statistics
from generation.labels import TEXTS, compute_labels, rouge_l
from tests.generation.fixed_llm import FixedLLM

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS = 30
CHRF = load(None, ["generate.label.metric=chrf"])
both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@pytest.fixture(scope="module")
def made(ray_here, tmp_path_factory):
    """Return a published set on disk with candidates of every source."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"instruction": f"say {n}", "references": [f"number {n}", f"№ {n}"], "dataset": "ab"[n % 2]} for n in range(ROWS)]
    rows.append({"instruction": "choose", "references": ["yes"], "answer_choices": ["yes", "no"]})
    rows.append({"instruction": "no references"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate.run_generate(load(None, [f"source={{kind: files, path: '{folder}/rows.jsonl'}}", f"dataset={folder}/set"]), load=FixedLLM)
    return f"{folder}/set"


def rows_of(uri):
    opened = RegressionSet(uri)
    return [row for split in ("train", "validation") for table in opened.batches(split) for row in table.to_pylist()]


@both
def test_only_the_labels_of_sampled_candidates_change(made, place):
    summary = annotate.run_annotate(CHRF, src=made, dst=place)
    old, new = rows_of(made), rows_of(place)
    assert len(new) == ROWS + 1 and sum(len(row["candidates"]) for row in new) == summary["pairs"]
    changed = 0
    for before, after in zip(old, new, strict=True):
        sampled = [[each["response"] for each in before["candidates"] if each["source"] == "sampled"]]
        expected = iter(compute_labels(pa.array(sampled, TEXTS), pa.array([before["references"]], TEXTS), CHRF.generate.label))
        for each in before["candidates"]:
            if each["source"] == "sampled":
                value = next(expected)
                changed += value != each["label"]
                each["label"] = value
        assert before == after
    assert changed > ROWS
    opened = RegressionSet(place)
    assert artifacts.verify(opened.uri, opened.manifest) == []
    assert (
        summary["labels"]
        == compute_statistics(pa.concat_tables(t for split in ("train", "validation") for t in opened.batches(split)))["labels"]
    )


def test_the_manifest_keeps_the_lineage_and_names_the_source_set(made, tmp_path):
    annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "new"))
    old, new = RegressionSet(made).manifest, RegressionSet(str(tmp_path / "new")).manifest
    assert new["metric"] == {"name": "chrf", "mode": None, "version": 1}
    assert new["relabelled_from"] == {"uri": made, "writer": old["writer"], "metric": {"name": "rouge_l", "mode": "paper", "version": 1}}
    assert new["writer"] != old["writer"]
    assert all(new[key] == old[key] for key in ("kind", "counts", "schema", "lineage"))
    assert new["config"]["generate"]["label"] == {"metric": "chrf", "mode": "paper"}
    assert load(tmp_path / "new" / "config.yaml") == load(Path(made) / "config.yaml", ["generate.label.metric=chrf"])
    assert new["files"].keys() == old["files"].keys() and not (tmp_path / "new" / "_staging").exists()


def test_a_round_trip_to_another_metric_gives_equal_bytes(made, tmp_path):
    annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "chrf"))
    annotate.run_annotate(load(), src=str(tmp_path / "chrf"), dst=str(tmp_path / "again"))
    names = [name for name in RegressionSet(made).manifest["files"] if name.startswith("data/")]
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (Path(made) / name).read_bytes()


def test_labels_equal_those_of_single_pairs_and_row_groups_are_unchanged(made, tmp_path):
    (name,) = [name for name in RegressionSet(made).manifest["files"] if name.startswith("data/train/")]
    table = pq.read_table(Path(made) / name)
    for group in (table, table.slice(3, 5)):
        for row in annotate.replace_labels(group, load(None, ["generate.label.mode=unicode"]).generate.label).to_pylist():
            for each in row["candidates"]:
                if each["source"] == "sampled":
                    assert each["label"] == rouge_l(each["response"], row["references"], "unicode")
    annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "new"))
    groups = [pq.ParquetFile(Path(place) / name).metadata.num_row_groups for place in (made, tmp_path / "new")]
    assert groups[0] == groups[1]


def test_a_damaged_or_incomplete_source_is_refused_and_nothing_published(made, tmp_path):
    copy = tmp_path / "copy"
    storage.download_folder(made, copy)
    (name,) = [name for name in RegressionSet(made).manifest["files"] if name.startswith("data/train/")]
    shard = copy / name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(CappyError, match=rf"SRC: .*copy/{name} does not match the SHA-256"):
        jobs.run_verb("annotate", CHRF, src=str(copy), dst=str(tmp_path / "new"))
    shard.unlink()
    with pytest.raises(CappyError, match=rf"{name} is missing; copy or generate the set again"):
        jobs.run_verb("annotate", CHRF, src=str(copy), dst=str(tmp_path / "new"))
    with pytest.raises(CappyError, match="did not finish"):
        RegressionSet(str(tmp_path / "new"))
    shard.write_bytes(whole)
    assert annotate.run_annotate(CHRF, src=str(copy), dst=str(tmp_path / "new"))["instructions"] == ROWS + 1


def test_a_destination_that_overlaps_the_source_or_is_published_is_refused(made, tmp_path):
    for dst in (made, f"{made}/", f"{made}/data", str(Path(made).parent)):
        with pytest.raises(UsageError, match=r"same folder or one is in the other"):
            annotate.run_annotate(CHRF, src=made, dst=dst, overwrite=True)
    assert len(rows_of(made)) == ROWS + 1
    taken = str(tmp_path / "taken")
    annotate.run_annotate(CHRF, src=made, dst=taken)
    with pytest.raises(UsageError, match=r"DST=.*taken already holds a finished run; choose another DST"):
        annotate.run_annotate(CHRF, src=made, dst=taken)
    assert annotate.run_annotate(load(), src=made, dst=taken, overwrite=True)["instructions"] == ROWS + 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["README.md", "data/train/mine.parquet", "_staging/thesis.txt"])
def test_a_destination_with_foreign_files_is_refused_and_unchanged(made, name, overwrite, tmp_path):
    storage.write_bytes(f"{tmp_path}/new/{name}", b"theirs")
    with pytest.raises(UsageError, match=rf"DST=.*new holds files that no `cappy annotate` wrote, e\.g\. {name}; nothing was deleted"):
        annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "new"), overwrite=overwrite)
    assert storage.list_files(f"{tmp_path}/new") == {name: 6}


def test_a_finished_destination_with_a_foreign_file_is_not_overwritten(made, tmp_path):
    storage.download_folder(made, tmp_path / "new")
    storage.write_bytes(f"{tmp_path}/new/thesis.txt", b"theirs")
    before = storage.list_files(f"{tmp_path}/new")
    with pytest.raises(UsageError, match=r"e\.g\. thesis\.txt; nothing was deleted: choose another DST"):
        annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "new"), overwrite=True)
    assert storage.list_files(f"{tmp_path}/new") == before


def test_a_destination_started_with_another_metric_is_refused(made, tmp_path):
    source = RegressionSet(made)
    origin = {"uri": source.uri, "writer": source.manifest["writer"], "metric": source.manifest["metric"]}
    storage.create_json(f"{tmp_path}/new/_staging/run.json", {"relabelled_from": origin, "metric": source.manifest["metric"]})
    with pytest.raises(
        UsageError, match=r'was started with another source or metric \(metric.mode: "paper" -> null; metric.name: "rouge_l" -> "chrf"\)'
    ):
        annotate.run_annotate(CHRF, src=made, dst=str(tmp_path / "new"))


@pytest.mark.slow
def test_the_command_labels_again_and_prints_its_summary(made, tmp_path):
    command = ["annotate", made, str(tmp_path / "new"), "--set", "generate.label.metric=exact_match", "--json"]
    result = CliRunner().invoke(app, command)  # in this process, where Ray runs
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["uri"] == str(tmp_path / "new") and summary["pairs"] == sum(summary["labels"])
    assert "labelling" in result.stderr
    shown = CliRunner(env={"COLUMNS": "150"}).invoke(app, ["inspect", str(tmp_path / "new")])
    assert "labels exact_match (version 1)" in shown.stdout


@both
def test_a_second_run_at_one_destination_is_refused(made, place, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    with lease.hold(f"{place}/_lease", "DST"), pytest.raises(CappyError, match=rf"DST={place}: a run on .* is working there"):
        annotate.run_annotate(CHRF, src=made, dst=place)
    assert {name.split("/")[0] for name in storage.list_files(place)} == {"_lease"}
    annotate.run_annotate(CHRF, src=made, dst=place)
    assert set(storage.list_files(place)) == {*RegressionSet(place).manifest["files"], "_MANIFEST.json"}  # and no lease


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_lost_its_lease_leaves_the_files_of_the_winner(made, overwrite, tmp_path, monkeypatch):
    place = str(tmp_path / "new")
    if overwrite:
        annotate.run_annotate(load(), src=made, dst=place)
    files = {}
    real = annotate._write_shards

    def paused(*arguments):
        """After the shards the process is paused, and another run takes the lease and publishes."""
        written = real(*arguments)
        if not files:
            files["_"] = b""
            for name in storage.list_files(place):
                storage.delete(f"{place}/{name}")
            annotate.run_annotate(load(None, ["generate.label.metric=exact_match"]), src=made, dst=place, overwrite=overwrite)
            files.update({name: storage.read_bytes(f"{place}/{name}") for name in storage.list_files(place)})
        return written

    monkeypatch.setattr(annotate, "_write_shards", paused)
    with pytest.raises(CappyError, match="lease lost: another run took over"):
        annotate.run_annotate(CHRF, src=made, dst=place, overwrite=overwrite)
    assert {"_": b""} | {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_files(place)} == files
    assert artifacts.verify(place, RegressionSet(place).manifest) == []


def test_a_full_disk_in_a_task_names_the_path_and_the_same_command_resumes(made, small_disk):
    place = f"{small_disk.folder}/new"
    small_disk.fill()
    with (small_disk.folder / "filler").open("r+b") as filler:
        filler.truncate(filler.seek(0, 2) - 12_000)  # room for the lease and the record, not for the shards
    with pytest.raises(CappyError, match=rf"^{place}/.* cannot be written \(No space left on device\); free some space there") as caught:
        jobs.run_verb("annotate", CHRF, src=made, dst=place)
    assert "\n" not in str(caught.value) and f"{place}/data/" in str(caught.value)
    small_disk.free()
    jobs.run_verb("annotate", CHRF, src=made, dst=place)
    assert set(storage.list_files(place)) == {*RegressionSet(place).manifest["files"], "_MANIFEST.json"}
