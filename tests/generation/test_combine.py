import json

import pyarrow as pa
import pytest
import yaml

import cappy
from cluster import artifacts, copying, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import annotate, earlier_set, export_pairs, plan
from generation.combine import run_combine
from generation.dataset import RegressionSet
from generation.export import ExportOptions, run_export
from generation.pair_units import read_pairs
from tests.conftest import cappy as command
from tests.generation import made_set
from tests.generation.made_set import publish

FIRST, SECOND = 0, 1000
HOT = {"sampler.decodings": [{"name": "hot", "temperature": 1.3, "n": 2}]}


def rows_of(*uris, split="train"):
    return [row for uri in uris for table in RegressionSet(uri).batches(split) for row in table.to_pylist()]


@pytest.fixture(params=["disk", "s3"])
def sets(request, tmp_path):
    """Two sets with different rows and decodings, and a place for their combination, on disk or in object storage."""
    root = request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)
    one, two, both = (f"{root}/{name}" for name in ("one", "two", "both"))
    publish(one, first=FIRST, letters='{"stage": "read", "reason": "no reference", "where": "a"}\n')
    publish(two, train=(5,), validation=(2, 2), first=SECOND, config=load(None, HOT))
    return one, two, both


def test_a_combined_set_has_the_rows_and_counts_of_its_sets_and_no_copy_of_their_shards(sets):
    one, two, both = sets
    summary = run_combine([one, two], both)
    assert not [name for name in storage.list_files(both) if name.startswith(("data/", "_staging/", "_lease/"))]
    combined = RegressionSet(both)
    for split, count in (("train", 15), ("validation", 7)):
        assert rows_of(both, split=split) == rows_of(one, two, split=split)
        assert combined.rows(split) == count
    parts = [RegressionSet(uri).manifest for uri in (one, two)]
    for name in ("instructions", "pairs", "tokens", "dead_letters"):
        assert summary[name] == sum(each["summary"][name] for each in parts)
    assert summary["splits"]["train"]["pairs"] == sum(each["counts"]["train"]["pairs"] for each in parts)
    assert storage.read_bytes(f"{both}/dead_letters.jsonl") == storage.read_bytes(f"{one}/dead_letters.jsonl")
    assert [each["uri"] for each in combined.manifest["combines"]] == [one, two]
    names = [each["name"] for each in combined.manifest["config"]["sampler"]["decodings"]]
    assert names[-1] == "hot" and len(names) == len(set(names)) > 1
    assert yaml.safe_load(storage.read_bytes(f"{both}/config.yaml")) == combined.manifest["config"]
    assert artifacts.verify(both, combined.manifest) == []
    card = storage.read_bytes(f"{both}/README.md").decode()
    assert f"13 instructions of `{one}`" in card and "decodings hot" in card and "part-*.parquet'" not in card
    assert run_combine([one, two], both) == summary
    with pytest.raises(UsageError, match="already holds a finished run"):
        run_combine([two, one], both)
    assert RegressionSet(both).manifest == combined.manifest
    run_combine([two, one], both, overwrite=True)
    assert rows_of(both) == rows_of(two, one)
    with pytest.raises(UsageError, match="rows are in more than one set"):
        run_combine([one, publish_at(f"{both}-same", FIRST)], both, overwrite=True)
    assert rows_of(both) == rows_of(two, one)


def test_verbs_that_copy_or_convert_a_combined_set_read_its_shards(sets, tmp_path):
    one, two, both = sets
    run_combine([one, two], both)
    nested = run_combine([both, publish_at(f"{both}-third", 2000)], f"{both}-nested")
    assert nested["instructions"] == 22 + 13
    assert all("third" in uri or "nested" not in uri for uri in RegressionSet(f"{both}-nested").shards("train"))
    copied = str(tmp_path / "copied")
    copying.copy_folder(both, copied)
    there = RegressionSet(copied)
    assert all("uri" not in entry for entry in there.manifest["files"].values()) and artifacts.verify(copied, there.manifest) == []
    assert rows_of(copied) == rows_of(one, two)
    assert copying.copy_folder(both, copied)["copied_files"] == 0
    pairs = export_pairs.export_pairs(both, str(tmp_path / "pairs"))
    assert pairs["files"] == len(there.shards("train")) + len(there.shards("validation"))
    assert sum(1 for _ in read_pairs(both)) == there.manifest["summary"]["pairs"]
    exported = run_export(both, str(tmp_path / "sft"), ExportOptions("sft"))
    assert exported["rows"] == 22
    shown = cappy.inspect(both)
    assert shown["problems"] == [] and shown["samples"][0] == rows_of(one)[0]


def publish_at(uri, first):
    publish(uri, first=first)
    return uri


def test_sets_with_equal_rows_are_refused(sets):
    one, two, both = sets
    publish(f"{both}-same", train=(2,), validation=(1,), first=SECOND + 3)
    with pytest.raises(UsageError, match=rf"3 rows are in more than one set \({two} and {both}-same\), e.g. with id 0+3eb; .*cappy extend"):
        run_combine([one, two, f"{both}-same"], both)
    with pytest.raises(UsageError, match="give two different sets or more"):
        run_combine([one, one], both)
    with pytest.raises(UsageError, match="give two different sets or more"):
        run_combine([one], both)
    assert storage.list_files(both) == {}


def test_an_instruction_in_two_splits_is_refused(tmp_path, monkeypatch):
    one, two, both = (str(tmp_path / name) for name in ("one", "two", "both"))
    publish(one, train=(3,), validation=(1,))
    made = made_set.row
    # Rows with other ids, and the instructions of `one`: its train rows 0, 1 and 2 are validation rows here.
    monkeypatch.setattr(
        made_set, "row", lambda number, name: {**made(number, name), "instruction": made(number - 5000)["instruction"] + " "}
    )
    publish(two, train=(0,), validation=(3,), first=5000)
    with pytest.raises(UsageError, match=rf"3 instructions of {two} are in another split in an earlier SRC, e.g. 'say right 0.*splits"):
        run_combine([one, two], both)
    assert storage.list_files(both) == {}


def test_sets_of_other_metrics_decodings_or_places_are_refused(sets, bucket, tmp_path):
    one, two, both = sets
    publish(f"{both}-chrf", first=3000, config=load(None, {"generate.label.metric": "chrf"}))
    with pytest.raises(UsageError, match=r"other metric than .*one \(.*name: \"rouge_l\" -> \"chrf\".*\); .*cappy annotate"):
        run_combine([one, f"{both}-chrf"], both)
    cold = {"sampler.decodings": [{"name": "hot", "temperature": 0.7}]}
    publish(f"{both}-cold", first=4000, config=load(None, cold))
    with pytest.raises(UsageError, match=r"the decoding 'hot' has other settings in .*cold than in .*two \(temperature: 1.3 -> 0.7\)"):
        run_combine([one, two, f"{both}-cold"], both)
    publish(str(tmp_path / "local"), first=6000)
    if not storage.is_s3(one):
        with pytest.raises(UsageError, match=rf"SRC={one} is on this machine, and readers of DST=.*cappy push"):
            run_combine([one, two], f"{bucket}/both")
    with pytest.raises(UsageError, match="the same folder or one is in the other"):
        run_combine([one, two], f"{one}/both")
    storage.write_bytes(f"{both}/data/train/mine.parquet", b"x")
    with pytest.raises(UsageError, match=r"holds files that no `cappy combine` wrote, e.g. data/train/mine.parquet"):
        run_combine([one, two], both)
    assert set(storage.list_files(both)) == {"data/train/mine.parquet"}


def test_a_set_that_was_changed_or_deleted_later_is_not_read(sets, tmp_path):
    one, two, both = sets
    run_combine([one, two], both)
    shard = f"{two}/data/train/part-00000.parquet"
    sound = storage.read_bytes(shard)
    storage.write_bytes(shard, sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    with pytest.raises(
        CappyError, match=rf"{shard} was changed or deleted \(its SHA-256 .*\), and {both} refers to it; run `cappy combine`"
    ):
        rows_of(both)
    assert any(f"({shard}) does not match its SHA-256" in each for each in cappy.inspect(both)["problems"])
    with pytest.raises(CappyError, match=rf"{shard} does not match its SHA-256, read 3 times; nothing is published"):
        copying.copy_folder(both, str(tmp_path / "copied"))
    storage.delete(shard)
    with pytest.raises(CappyError, match=rf"{shard} was changed or deleted"):
        rows_of(both)
    assert any(f"({shard}) is missing" in each for each in cappy.inspect(both)["problems"])


def test_a_damaged_set_is_not_combined(sets):
    one, two, both = sets
    shard = f"{two}/data/train/part-00000.parquet"
    storage.write_bytes(shard, b"x")
    with pytest.raises(CappyError, match=rf"{shard} is damaged or missing"):
        run_combine([one, two], both)
    assert storage.list_files(both) == {}


def test_the_files_of_a_run_that_ended_before_its_manifest_are_replaced(sets, monkeypatch):
    one, two, both = sets

    def die(*args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "publish_folder", die)
        with pytest.raises(RuntimeError):
            run_combine([one, two], both)
    assert "config.yaml" in storage.list_files(both)
    run_combine([two, one], both)
    assert rows_of(both) == rows_of(two, one)


def test_a_combined_set_is_not_extended(sets):
    one, two, both = sets
    run_combine([one, two], both)
    config = load(None, {"generate.extend": both, "dataset": f"{both}-more"})
    with pytest.raises(UsageError, match=r"is a combined set, whose sets have different settings; extend one of them"):
        earlier_set.refuse_unfit(RegressionSet(both), config)


def test_a_manifest_that_names_another_place_for_a_card_is_refused(tmp_path):
    entry = {"bytes": 1, "sha256": "0", "uri": "/etc/hostname"}
    for name in ("README.md", "data/train/part-00000.parquet"):
        place = str(tmp_path / name.replace("/", "-"))
        artifacts.publish(place, {"kind": "dataset", "files": {name: entry}})
        with pytest.raises(CappyError, match=r"only a Parquet shard may be elsewhere; do not use it"):
            copying.copy_folder(place, str(tmp_path / "copied"))


def test_a_combined_set_is_labelled_again_as_its_sets_are(tmp_path, ray_here):
    places = [str(tmp_path / name) for name in ("one", "two", "both", "relabelled")]
    one, two, both, relabelled = places
    publish_at(one, FIRST)
    publish_at(two, SECOND)
    run_combine([one, two], both)
    annotate.run_annotate(load(None, ["generate.label.metric=token_f1"]), src=both, dst=relabelled)
    files = RegressionSet(relabelled).manifest["files"]
    assert all("uri" not in entry for entry in files.values()) and artifacts.verify(relabelled, {"files": files}) == []
    before, after = rows_of(one, two), rows_of(relabelled)
    assert [row["id"] for row in before] == [row["id"] for row in after] and before != after
    for row in after:
        sampled = [each["label"] for each in row["candidates"] if each["source"] == "sampled"]
        assert sampled[-1] == 1 and max(sampled[:-1]) < 1
    assert "combines" in RegressionSet(relabelled).manifest
    for uri in (both, relabelled):  # the time of the sampling is not in them
        with pytest.raises(UsageError, match=rf"plan.rates_from={uri} has no tokens_per_second"):
            plan.find_rates(load(None, [f"plan.rates_from={uri}"]))


def test_ray_reads_shards_on_disk_and_in_object_storage(bucket, tmp_path, ray_here):
    one, two, both = f"{bucket}/one", str(tmp_path / "two"), str(tmp_path / "both")
    publish(one)
    publish(two, first=SECOND)
    run_combine([one, two], both)
    found = RegressionSet(both).to_ray("train")
    ids = pa.concat_tables(found.iter_batches(batch_format="pyarrow"))["id"]
    assert sorted(ids.to_pylist()) == sorted(row["id"] for row in rows_of(one, two))


def test_the_command_prints_a_summary(tmp_path):
    publish(str(tmp_path / "one"))
    publish(str(tmp_path / "two"), first=SECOND)
    places = [str(tmp_path / name) for name in ("one", "two", "both", "more")]
    done = command("combine", *places[:3], "--json")
    assert json.loads(done.stdout.splitlines()[-1])["instructions"] == 26
    shown = command("inspect", places[2])
    assert shown.returncode == 0 and f"combined from {places[0]}, {places[1]}" in shown.stdout.replace("\n", "")
    refused = command("combine", places[0], *places[2:])
    assert refused.returncode == 2 and "13 rows are in more than one set" in refused.stderr
